"""Pipelines: each process has some blocks, and micro-batches go through them one behind the other.

The one idea: a stage is the same policy under a cut (`models/trunk.py`), so methods, packed attention and fused blocks
are those of one process; the schedules are torch's (`stages.py`). A weight that embedding and head share is on the
first and the last stage, which add up its gradients. GPipe: Huang et al. 2019, arXiv 1811.06965; 1F1B: Narayanan et
al. 2019, arXiv 1806.03377; interleaved: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.core.types import Batch
from tunesmith.kernels.quantized import Quantized
from tunesmith.models.ports import Port, attached_to, held_by
from tunesmith.models.targets import block_paths
from tunesmith.models.trunk import current_cut
from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.parts import Parts
from tunesmith.parallel.stages import Engine, Span, spans
from tunesmith.parallel.world import World


class Pipeline(Parts):
    """Blocks in parts."""

    def __init__(self, world: World, section: LayoutSection) -> None:
        super().__init__(world, section)
        self.section = section
        self.engine: Engine
        # replicas send each other something within every pass
        self.in_step = section.shard in ("zero2", "zero3")
        self._ends: World | None = None
        self._tied: set[str] = set()

    def adopt(self, tuned: Any) -> Any:
        """The same with the blocks of this process alone. Raises ConfigError where one would have nothing to train."""
        # what states are in; zero3 keeps weights in another dtype
        dtype = tuned.policy.model.get_input_embeddings().weight.dtype
        tuned = super().adopt(tuned)
        group = self.mesh.get_group("pipe")
        self.engine = Engine(tuned.policy, self.section, self.pipe, group, self._lowest, dtype, self.passed)
        self.passes = self._passes
        tuned.policy = _StagedPolicy(tuned.policy, self.engine)
        return tuned

    def cut(self, tuned: Any) -> None:
        super().cut(tuned)
        policy = tuned.policy
        stages = _stages_of(policy, spans(len(block_paths(policy.model, policy.family)), self.section.stages))
        mine = {stage for stage in range(self.section.stages) if stage % self.pipe.size == self.pipe.rank}
        trained = {name: stages[id(parameter)] for name, parameter in tuned.parameters.items()}
        self._check(trained)
        self._lowest = min(min(held) for held in trained.values())
        self._tied = {name for name, held in trained.items() if len(held) > 1}
        self._join_ends()
        tuned.parameters = {name: held for name, held in tuned.parameters.items() if trained[name] & mine}
        self.inner.apart = self._tied
        # embedding and head are on different processes, so that one stage has each
        self.inner.turns = {name: min(trained[name] & mine) for name in tuned.parameters}
        if 0 not in mine:
            _without_embedding(policy.model.get_input_embeddings())
        for parameter in held_by(policy.model):
            if not stages[id(parameter)] & mine:
                _let_go(parameter)

    def reduce(self, names: Collection[str]) -> set[str]:
        unreached = super().reduce(names)
        if self._ends is not None:
            self._add_up(self._tied & set(names), self._ends)
        return unreached

    def facts(self) -> dict[str, Any]:
        return super().facts() | self.engine.facts()

    def _passes(
        self,
        objective: Any,
        batches: Sequence[Batch],
        weight: float,
        reseed: Callable[[int], object],
        spare: Batch | None,
    ) -> list[Tensor]:
        """All passes of a step: `layout.Passes`."""
        most = int(self.data.most(len(batches))) if self.in_step else len(batches)
        return self.engine.step(objective, batches, weight, reseed, spare, most)

    def _join_ends(self) -> None:
        """The processes of the first and the last stage as a world; every process takes part in making them all."""
        if not self._tied:
            return
        for replica in self.mesh.mesh.tolist():
            for first, last in zip(replica[0], replica[-1], strict=True):
                group = dist.new_group([first, last])
                if self.world.rank in (first, last):
                    self._ends = self.world.within(group)

    def _check(self, trained: dict[str, set[int]]) -> None:
        for rank in range(self.pipe.size):
            if not any(stage % self.pipe.size == rank for held in trained.values() for stage in held):
                told = f"process {rank} of the pipeline would have nothing to train"
                raise ConfigError(told, where="layout.pipeline", hint="fewer processes, or targets in all blocks")


class _StagedPolicy:
    """A policy whose model is spread over stages."""

    def __init__(self, policy: Any, engine: Engine) -> None:
        self._policy, self._engine = policy, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def train(self, mode: bool = True) -> _StagedPolicy:
        self._policy.train(mode)
        return self

    def token_losses(self, batch: Batch) -> Tensor:
        """As `Policy.token_losses`, on every process, without gradients."""
        return self._engine.asked(batch, lambda policy, batch: policy.token_losses(batch), batch.targets.shape)

    def scores(self, batch: Batch) -> Tensor:
        """As `Policy.scores`, likewise."""
        (head,) = attached_to(self._policy.model).heads.values()
        rows = batch.sources.numel() if head.pooling == "token" else len(batch.lengths)
        return self._engine.asked(batch, lambda policy, batch: policy.scores(batch), (rows, head.problem.outputs))


def _stages_of(policy: Any, held: list[Span]) -> dict[int, set[int]]:
    """The stages of each parameter, by its id."""
    model, last = policy.model, len(held) - 1
    paths = block_paths(model, policy.family)
    found: dict[int, set[int]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        block = next((number for number, name in enumerate(paths) if path.startswith(name + ".")), None)
        stage = last if block is None else next(at for at, span in enumerate(held) if span.holds(block))
        found.setdefault(id(parameter), set()).add(stage)
    found |= {id(held): {last} for head in attached_to(model).heads.values() for held in head.parameters()}
    embed = model.get_input_embeddings()
    for parameter in embed.parameters():
        # a head that shares it has put it on the last stage
        head = model.get_output_embeddings()
        shares = head is not None and any(parameter is other for other in head.parameters())
        found[id(parameter)] = {0, last} if shares else {0}
    return found


def _let_go(parameter: nn.Parameter) -> None:
    """Frees the numbers of a parameter, or its codes."""
    if isinstance(parameter, Quantized):
        parameter.parts = {name: part.new_empty(0) for name, part in parameter.parts.items()}
    else:
        parameter.data = parameter.data.new_empty(0)


def _without_embedding(embed: nn.Module) -> None:
    """Blocks below a cut answer its states whatever they are given, so here is nothing to look up."""

    def given(ids: Tensor) -> Tensor:
        cut = current_cut()
        assert cut is not None
        assert cut.states is not None
        return cut.states

    for module in (embed, *((embed.base,) if isinstance(embed, Port) else ())):
        module.__dict__["forward"] = given
