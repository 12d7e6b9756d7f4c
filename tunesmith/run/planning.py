"""The plan of a prepared run: the real model and method on the meta device, counted and traced."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunesmith.core.switches import without
from tunesmith.data.deal import deal
from tunesmith.data.pack import cut, cut_into
from tunesmith.run.prepare import Prepared

if TYPE_CHECKING:
    from tunesmith.config import Config
    from tunesmith.models.load import Loaded
    from tunesmith.models.recompute import How, Recompute
    from tunesmith.plan.plan import Plan


def plan_run(prepared: Prepared, *, calibrated: bool = True, chosen: dict[str, Any] | None = None) -> Plan:
    """What the run will need. Raises ConfigError where the method does not fit the model.

    Args:
        calibrated: measure this machine (once, for a second or two) so that the plan can say how long.
        chosen: what an earlier plan of the run chose to recompute, for `train.recompute: auto`; None chooses now.
    """
    from torch import nn

    from tunesmith.models.heads import value_head
    from tunesmith.models.policy import Policy
    from tunesmith.models.recompute import Blocks
    from tunesmith.plan.choice import cheapest
    from tunesmith.plan.compute import calibrate
    from tunesmith.plan.memory import tensor_specs
    from tunesmith.plan.plan import Workload, make_plan
    from tunesmith.plan.room import room_bytes
    from tunesmith.plan.shape import read_shape
    from tunesmith.plan.spread import Spread
    from tunesmith.train.precision import resolve

    config = prepared.config
    compute = resolve(config.precision)
    loaded = open_meta(prepared)
    adapter = config.method.attach(loaded, seed=config.train.seed)
    policy = Policy(loaded, adapter.route, packed=config.data.packing)
    lengths, share, micro_batches = _micro_batch(prepared)
    totals = prepared.totals
    shape = read_shape(prepared.folder)
    spread: Any = Spread(config.layout.data, config.layout.shard, micro_batches)
    if config.layout.tensor * config.layout.pipeline > 1:
        from tunesmith.plan.parts import PartsSpread

        spread = PartsSpread(
            config.layout,
            shape.n_layers,
            shape.d_model,
            loaded.model.dtype.itemsize,
            max(1, round(micro_batches)),
            round(totals.tokens / totals.steps / config.layout.data),
            sum(lengths),
            config.precision.master,
        )
    trained = list(adapter.parameters.values())
    if config.objective.has_values:
        policy.value = value_head(loaded, config.train.seed)
        trained += policy.value.parameters()
    heads = [head for head in (adapter.head, policy.value) if head is not None]
    model = nn.ModuleList([loaded.model, *heads]) if heads else loaded.model
    calibration = calibrate(shape, sum(lengths), compute) if calibrated else None

    def made(how: How | Recompute) -> Plan:
        policy.recompute(how)
        found = make_plan(
            model,
            shape,
            Workload(totals.steps, totals.tokens, lengths, share, config.objective.predicts),
            trainable=trained,
            loss=lambda batch: config.objective.loss(policy, batch).total,
            master=config.precision.master,
            optimizer_state=config.train.optimizer_state,
            calibration=calibration,
        )
        return spread.applied(found, tensor_specs(model, trained))

    # blocks that listen to hooks run as transformers has them (`models.blocks.fits`)
    plain = without("elementwise") if config.layout.shard == "zero3" else nullcontext()

    with plain:
        if config.train.recompute != "auto":
            return made(config.train.recompute)
        if chosen is not None:
            return replace(made(recomputed(config, chosen)), recompute=chosen)
        # the processes share what there is
        return cheapest(made, Blocks(loaded.model, loaded.family).count, room_bytes() // config.layout.processes)


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


def _micro_batch(prepared: Prepared) -> tuple[tuple[int, ...], float, float]:
    """Lengths of the largest micro-batch among the first steps, the share of its tokens that is supervised, and how
    many micro-batches a process makes in a step."""
    from itertools import islice

    from tunesmith.data.pack import Cursor

    layout = prepared.config.layout

    def parted(rows: list[Any]) -> list[list[Any]]:
        return cut(rows, prepared.sizes) if layout.micro_batches is None else cut_into(rows, layout.micro_batches)

    largest: list[Any] = []
    counts = []
    for step in islice(prepared.stream(Cursor()), 8):
        hands = [parted(rows) for rows in deal(prepared.planned(step), layout.data)]
        counts.append(max(map(len, hands)))
        for rows in (rows for hand in hands for rows in hand):
            if sum(len(row.ids) for row in rows) > sum(len(row.ids) for row in largest):
                largest = rows
    tokens = sum(len(row.ids) for row in largest)
    supervised = sum(sum(row.supervised) for row in largest)
    lengths = tuple(len(row.ids) for row in largest)
    return lengths, supervised / max(1, tokens), sum(counts) / max(1, len(counts))
