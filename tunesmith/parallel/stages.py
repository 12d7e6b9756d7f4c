"""What a process does in a pipeline: its stages as torch.distributed.pipelining runs them, a step at a time.

The one idea: all micro-batches of a step are made equally long, by documents that nobody is taught and that attend to
themselves alone, because a stage receives what it was told to expect. They change no loss. What is sent is counted
where torch asks for it, and the time between a stage's passes is the pipeline's idle time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from tunesmith.core.errors import TunesmithError
from tunesmith.core.switches import without
from tunesmith.core.types import Batch
from tunesmith.models.cross_entropy import wide
from tunesmith.models.trunk import Cut
from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.traffic import Traffic
from tunesmith.parallel.world import World


@dataclass(frozen=True)
class Span:
    """The blocks of a stage: from `first` to before `last`; None is the end of the model, its norm and its head."""

    first: int
    last: int | None

    def holds(self, block: int) -> bool:
        """Whether a block is one of them."""
        return self.first <= block and (self.last is None or block < self.last)

    def cut(self, states: Tensor | None) -> Cut:
        """The cut under which these blocks run."""
        if states is None:
            assert self.last is not None
            return Cut(self.last)
        return Cut(self.first, states[None], until=self.last)


class Engine:
    """The stages of one process.

    Args:
        policy: the model, with the parameters of its own stages.
        parts: the processes of the pipeline.
        group: torch's name for them.
        lowest: the lowest stage with something to train: what comes from below it needs no gradient.
        dtype: of states.
        passed: is called after each backward pass, with the number of its stage.
    """

    def __init__(
        self,
        policy: Any,
        section: LayoutSection,
        parts: World,
        group: Any,
        lowest: int,
        dtype: torch.dtype,
        passed: Callable[[int], None],
    ) -> None:
        held = spans(int(policy.config.num_hidden_layers), section.stages)
        self.policy, self.section, self.parts, self.group = policy, section, parts, group
        self.lowest, self.dtype, self.passed = lowest, dtype, passed
        self.numbers = [number for number in range(len(held)) if number % parts.size == parts.rank]
        self.has_last = len(held) - 1 in self.numbers
        self.modules = [_Blocks(self, held[number]) for number in self.numbers]
        self.batches: Sequence[Batch] = ()
        self.reseed: Callable[[int], object] = lambda micro: None
        self.answer: Callable[[Any, Batch], Tensor]
        self.busy_seconds = self.seconds = 0.0
        self.ideal = [0.0, 0]

    def step(
        self,
        objective: Any,
        batches: Sequence[Batch],
        weight: float,
        reseed: Callable[[int], object],
        spare: Batch | None,
        least: int,
    ) -> list[Tensor]:
        """All passes of a step: `layout.Passes`.

        Args:
            least: so many micro-batches are computed, for others wait for it.
        """
        given = batches or ([spare] if spare is not None and least else [])
        if not given:
            return []
        count = len(batches)
        self.batches, self.reseed = levelled(given, wanted(max(count, least), self.section)), reseed
        self.answer = lambda policy, batch: _total(objective, policy, batch)
        totals: list[Tensor] = []

        def divided(total: Tensor, micro: Tensor) -> Tensor:
            totals.append(total.detach())
            return total / weight if int(micro) < count else total * 0.0

        schedule = self._schedule(len(self.batches), divided)
        began = time.perf_counter()
        self._run(schedule, is_taught=True)
        self.seconds += time.perf_counter() - began
        self.ideal[0] += idle_share(self.section, len(self.batches))
        self.ideal[1] += 1
        self.batches = ()
        found = torch.zeros(count, dtype=torch.float64, device=self.parts.device)
        if self.has_last and count:
            found.copy_(torch.stack(totals[:count]))
        self.parts.traffic.broadcast(found, self.parts.size - 1)
        return list(found.unbind())

    def asked(self, batch: Batch, answer: Callable[[Any, Batch], Tensor], shape: Sequence[int]) -> Tensor:
        """What the policy answers of this shape, float32 or wider, in every process of the pipeline; no gradients."""
        self.batches, self.reseed, self.answer = [batch], lambda micro: None, answer
        busy_seconds = self.busy_seconds
        with torch.no_grad():
            found = self._run(self._schedule(1, None), is_taught=False)
        self.batches, self.busy_seconds = (), busy_seconds  # the share is that of steps
        if not self.has_last:
            found = torch.zeros(*shape, dtype=wide(self.policy.model.dtype), device=batch.ids.device)
        self.parts.traffic.broadcast(found, self.parts.size - 1)
        return found

    def facts(self) -> dict[str, Any]:
        """The share of the time of passes in which this process waited, and what a perfect pipeline has."""
        if not self.ideal[1]:
            return {}
        idle = 1 - self.busy_seconds / self.seconds
        return {"idle_share": round(idle, 4), "least_idle_share": round(self.ideal[0] / self.ideal[1], 4)}

    def _schedule(self, count: int, loss: Callable[..., Tensor] | None) -> Any:
        tokens = self.batches[0].ids.numel()
        stages = [
            _Stage(self, module, number, self._states(tokens, number - 1), self._states(tokens, number))
            for module, number in zip(self.modules, self.numbers, strict=True)
        ]
        how: dict[str, Any] = {"n_microbatches": count, "loss_fn": loss, "scale_grads": False}
        if self.section.schedule == "interleaved":
            return ScheduleInterleaved1F1B(list(stages), **how)
        # with fewer micro-batches than stages the two are the same
        is_gpipe = self.section.schedule == "gpipe" or count < self.section.stages
        return (ScheduleGPipe if is_gpipe else Schedule1F1B)(stages[0], **how)

    def _run(self, schedule: Any, *, is_taught: bool) -> Any:
        every = torch.arange(len(self.batches))
        given = (every,) if 0 in self.numbers else ()
        try:
            return schedule.step(*given, micro=every, target=every if is_taught else None, return_outputs=not is_taught)
        except RuntimeError as error:
            # torch tells where in the pipeline an error was, and hides what it was
            if isinstance(error.__cause__, TunesmithError):
                raise error.__cause__ from error
            raise

    def _states(self, tokens: int, stage: int) -> Tensor:
        """What comes out of a stage, without numbers; into the first go numbers of micro-batches."""
        if stage < 0:
            return torch.empty(1, dtype=torch.int64, device="meta")
        if stage == self.section.stages - 1:
            return torch.empty((), device="meta")
        shape = tokens, self.policy.config.hidden_size
        is_trained = stage >= self.lowest and torch.is_grad_enabled()
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=is_trained)


class _Blocks(nn.Module):
    """The blocks of a stage: states of the tokens of a micro-batch [tokens, width] to those behind them."""

    def __init__(self, engine: Engine, span: Span) -> None:
        super().__init__()
        self._engine, self.span = (engine,), span  # in a tuple: it is no submodule

    def forward(self, states: Tensor, micro: Tensor) -> Tensor:
        engine, number = self._engine[0], int(micro)
        batch = engine.batches[number]
        engine.reseed(number)
        is_first = self.span.first == 0
        # beginnings that documents share would make states of other lengths
        with self.span.cut(None if is_first else states).enter(), without("shared_prefix"):
            if self.span.last is None:
                return engine.answer(engine.policy, batch)
            found: Tensor = engine.policy.hidden(batch)
            return found


class _Stage(PipelineStage):
    """A stage of torch's that counts what it sends and how long it computes."""

    def __init__(self, engine: Engine, module: _Blocks, number: int, takes: Tensor, gives: Tensor) -> None:
        device = engine.policy.model.device
        super().__init__(module, number, engine.section.stages, device, takes, gives, group=engine.group)
        self.engine, self.traffic = engine, engine.parts.traffic

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        return _counted(self.traffic, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        return _counted(self.traffic, super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super().forward_one_chunk(*args, **kwargs)
        self.engine.busy_seconds += time.perf_counter() - began
        return found

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super().backward_one_chunk(*args, **kwargs)
        self.engine.busy_seconds += time.perf_counter() - began
        self.engine.passed(self.stage_index)
        return found


def spans(blocks: int, stages: int) -> list[Span]:
    """Which blocks each stage has: as even as can be, the lower ones longer, for the last one has the head."""
    short, longer = divmod(blocks, stages)
    ends = [0]
    for stage in range(stages):
        ends.append(ends[-1] + short + (stage < longer))
    return [Span(first, None if last == blocks else last) for first, last in pairwise(ends)]


def levelled(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Micro-batches of one length, as long as the longest, and `count` of them: the first stands in for what lacks."""
    tokens = max(batch.ids.numel() for batch in batches)
    return [_filled(batch, tokens) for batch in (*batches, *[batches[0]] * (count - len(batches)))]


def idle_share(section: LayoutSection, micro_batches: int) -> float:
    """The least share of its time that a process of a pipeline is idle: (P - 1) / (v K + P - 1).

    P processes, K micro-batches, v stages a process (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    waiting, each = section.pipeline - 1, section.stages // section.pipeline
    return waiting / (each * micro_batches + waiting)


def wanted(count: int, section: LayoutSection) -> int:
    """How many micro-batches a schedule takes: interleaved 1F1B has rounds of equally many."""
    rounds = max(1, count // section.pipeline) if section.schedule == "interleaved" else 1
    return -(-count // rounds) * rounds


def _filled(batch: Batch, tokens: int) -> Batch:
    """A batch with documents of its own usual length behind it, up to so many tokens."""
    missing, usual = tokens - batch.ids.numel(), max(batch.lengths, default=tokens)
    added = [min(usual, missing - done) for done in range(0, missing, usual)]
    places = [torch.arange(length, device=batch.ids.device) for length in added]
    return replace(
        batch,
        ids=torch.cat([batch.ids, batch.ids.new_zeros(missing)]),
        positions=torch.cat([batch.positions, *places]),
        lengths=(*batch.lengths, *added),
        rows=(*batch.rows, *[""] * len(added)),
        prompts=(*batch.prompts, *added) if batch.prompts else (),
    )


def _total(objective: Any, policy: Any, batch: Batch) -> Tensor:
    total: Tensor = objective.loss(policy if batch.labels is None else _Labelled(policy), batch).total
    return total


class _Labelled:
    """A policy that says nothing of the documents with which a micro-batch was filled: they have no labels."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def scores(self, batch: Batch) -> Tensor:
        assert batch.labels is not None
        found: Tensor = self._policy.scores(batch)
        return found[: len(batch.labels)]


def _counted(traffic: Traffic, sends: list[Any]) -> list[Any]:
    traffic.count("activations", sum(send.tensor.nbytes for send in sends))
    return sends
