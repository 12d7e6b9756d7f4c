"""The plan of a prepared run: the real model and method on the meta device, counted and traced."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.switches import without
from tunesmith.run.largest import judged, largest
from tunesmith.run.prepare import Prepared
from tunesmith.run.written import beside, score_bytes, with_written

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.config import Config
    from tunesmith.core.types import Batch
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.recompute import How, Recompute
    from tunesmith.plan.calibration import Calibration
    from tunesmith.plan.plan import Plan, Workload
    from tunesmith.plan.shape import ModelShape


def plan_run(
    prepared: Prepared,
    *,
    calibrated: bool = True,
    calibration: Calibration | None = None,
    chosen: dict[str, Any] | None = None,
) -> Plan:
    """What the run will need. Raises ConfigError where the method does not fit the model.

    Args:
        calibrated: say how long it takes.
        calibration: how fast the machine is; None measures this one, once, for a second or two.
        chosen: what an earlier plan of the run chose to recompute, for `train.recompute: auto`; None chooses now.
    """
    from tunesmith.models.recompute import Blocks
    from tunesmith.plan.choice import cheapest
    from tunesmith.plan.room import room_bytes

    config, loaded = prepared.config, open_meta(prepared)
    made = _traced(prepared, loaded, calibrated, calibration).plan
    # blocks that listen to hooks run as transformers has them (`models.blocks.fits`)
    plain = without("elementwise") if config.layout.shard == "zero3" else nullcontext()
    with plain:
        if config.train.recompute != "auto":
            return made(config.train.recompute)
        if chosen is not None:
            return replace(made(recomputed(config, chosen)), recompute=chosen)
        # the processes share what there is
        return cheapest(made, Blocks(loaded.model, loaded.family).count, room_bytes() // config.layout.processes)


@dataclass(frozen=True)
class _Traced:
    """The model of a run with all that trains beside it, on the meta device, and what it meets."""

    prepared: Prepared
    loaded: Loaded
    policy: Policy
    model: nn.Module
    trained: list[nn.Parameter]
    shape: ModelShape
    work: Workload
    spread: Any
    speed: Calibration | None
    scoring: int  # bytes

    def plan(self, how: How | Recompute) -> Plan:
        """Where so much is computed again."""
        import torch

        from tunesmith.plan.memory import tensor_specs
        from tunesmith.plan.plan import make_plan
        from tunesmith.train.offload import Offload

        config, policy = self.prepared.config, self.policy
        policy.recompute(how)
        offload = Offload(config.train.offload, policy, torch.device("cpu"), Path(config.out))

        def loss(batch: Batch) -> Tensor:
            with offload.forward():
                return config.objective.loss(policy, batch).total

        found = make_plan(
            self.model,
            self.shape,
            self.work,
            trainable=self.trained,
            loss=loss,
            master=config.precision.master,
            optimizer_state=config.train.optimizer_state,
            offload_optimizer=config.train.offload == "optimizer",
            calibration=self.speed,
        )
        spilled = found.memory.offloaded_bytes + offload.spilled_bytes
        found = replace(found, memory=replace(found.memory, offloaded_bytes=spilled))
        found = with_written(found, self.prepared, self.loaded, self.speed, self.scoring)
        return self.spread.applied(found, tensor_specs(self.model, self.trained))


def _traced(prepared: Prepared, loaded: Loaded, calibrated: bool, calibration: Calibration | None) -> _Traced:
    from tunesmith.models.heads import value_head
    from tunesmith.models.policy import Policy
    from tunesmith.plan.calibration import calibrate
    from tunesmith.plan.shape import read_shape
    from tunesmith.train.precision import resolve

    config = prepared.config
    adapter = config.method.attach(loaded, seed=config.train.seed)
    policy = Policy(loaded, adapter.route, packed=config.data.packing)
    # as it will be, for dropout keeps its masks; but tuners of peft then ask numbers, which a trace has none of
    trains = config.method.kind != "peft"
    policy.train(trains)
    shape = read_shape(prepared.folder)
    work, micro_batches = _work(prepared, policy, shape)
    spread = _spread(prepared, shape, loaded.model.dtype.itemsize, work.lengths, micro_batches)
    policy.teacher = _teacher(prepared, policy)
    policy.value = value_head(loaded, config.train.seed) if config.objective.has_values else None
    model, trained = _whole(prepared, adapter, policy)
    model.train(trains)
    scoring = score_bytes(prepared, policy)
    speed = None
    if calibrated:
        compute = resolve(config.precision)
        speed = calibration or calibrate(shape, work.micro_tokens, compute, base=config.precision.base)
    return _Traced(prepared, loaded, policy, model, trained, shape, work, spread, speed, scoring)


def _work(prepared: Prepared, policy: Policy, shape: ModelShape) -> tuple[Workload, float]:
    """How much there is to do, and how many micro-batches a process makes in a step."""
    from tunesmith.plan.plan import Workload

    config, totals = prepared.config, prepared.totals
    met, micro_batches = largest(prepared, policy, shape)
    held_out = judged(prepared, policy)
    batch = met[0].seen.batch
    share = batch.targets.numel() / max(1, batch.ids.numel())
    passes = micro_batches * totals.steps * config.layout.data
    predicts = config.objective.predicts
    work = Workload(totals.steps, totals.tokens, batch.lengths, share, predicts, passes, met, held_out)
    return work, micro_batches


def _whole(prepared: Prepared, adapter: Adapter, policy: Policy) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model with heads, adapters that stand beside the one that trains and another model that teaches, and what
    trains."""
    from torch import nn

    teacher = None if policy.teacher is None or policy.teacher.model is policy.model else policy.teacher.model
    adapters = beside(prepared)
    # a list without parameters is none
    others = [one for one in (adapter.head, policy.value, adapters or None, teacher) if one is not None]
    trained = [*adapter.parameters.values(), *(policy.value.parameters() if policy.value is not None else ())]
    return (nn.ModuleList([policy.model, *others]) if others else policy.model), trained


def recomputed(config: Config, chosen: dict[str, Any] | None) -> How | Recompute:
    """What a run computes again: as its configuration says, or as its plan chose."""
    from tunesmith.models.recompute import Recompute

    if config.train.recompute != "auto":
        return config.train.recompute
    return Recompute(chosen["whole"], chosen["partly"]) if chosen else "none"


def open_meta(prepared: Prepared) -> Loaded:
    """The model of a run on the meta device, with the question it is to answer."""
    from tunesmith.models.load import meta
    from tunesmith.train.precision import resolve

    precision = prepared.config.precision
    loaded = meta(str(prepared.folder), dtype=resolve(precision), base=precision.base)
    loaded.predicts = prepared.problem
    return loaded


def _teacher(prepared: Prepared, policy: Policy) -> Policy | None:
    """A stand-in for the teacher, asked in every step: the student's base, or the other model without weights."""
    from tunesmith.models.load import meta
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import BASE
    from tunesmith.train.precision import resolve

    found = prepared.teacher
    if found is None:
        return None
    if found.beside:
        return policy.under(BASE)
    loaded = meta(str(found.folder), dtype=resolve(prepared.config.precision))
    loaded.model.requires_grad_(False)
    return Policy(loaded, packed=prepared.config.data.packing)


def _spread(
    prepared: Prepared, shape: ModelShape, item_bytes: int, lengths: Sequence[int], micro_batches: float
) -> Any:
    """What becomes of a plan for one process where there are several."""
    from tunesmith.plan.parts import PartsSpread
    from tunesmith.plan.spread import Spread

    layout, totals = prepared.config.layout, prepared.totals
    if layout.tensor * layout.pipeline == 1:
        return Spread(layout.data, layout.shard, micro_batches)
    return PartsSpread(
        layout,
        shape.n_layers,
        shape.d_model,
        item_bytes,
        max(1, round(micro_batches)),
        round(totals.tokens / totals.steps / layout.data),
        sum(lengths),
        prepared.config.precision.master,
    )
