"""The page of a plan, with the same run under other layouts beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from tunesmith.core.files import write_atomic
from tunesmith.evaluate.plan_page import plan_page
from tunesmith.parallel.layout import Shard
from tunesmith.run.prepare import Prepared

if TYPE_CHECKING:
    from tunesmith.plan.plan import Plan

PROCESSES = (2, 4, 8)


def write_page(path: str, prepared: Prepared, plan: Plan, made: dict[str, Any]) -> None:
    """Writes the page of a plan. Raises ResourceError.

    Args:
        made: the plan as it is printed, with what stands beside it.
    """
    write_atomic(path, plan_page(prepared.config.model, made, plan.line, _layouts(prepared, plan)))


def _layouts(prepared: Prepared, plan: Plan) -> list[tuple[str, dict[str, int]]]:
    from tunesmith.plan.memory import tensor_specs
    from tunesmith.plan.spread import Spread
    from tunesmith.run.planning import open_meta

    if plan.layout is not None:  # the memory is of a part already
        return [("as configured", _parts(plan))]
    loaded = open_meta(prepared)
    adapter = prepared.config.method.attach(loaded, seed=prepared.config.train.seed)
    specs = tensor_specs(loaded.model, list(adapter.parameters.values()))
    found = [("one process", _parts(plan))]
    for count in PROCESSES:
        for shard in get_args(Shard):
            spread = Spread(count, shard).memory(plan.memory, specs)
            name = f"{count} processes, {'each with all' if shard == 'none' else shard}"
            found.append((name, _parts(replace(plan, memory=spread))))
    return found


def _parts(plan: Plan) -> dict[str, int]:
    """Bytes by part at the fullest moment: where gradients are not all there, they are the rest."""
    memory = plan.memory
    parts = {
        "weights": memory.weights_bytes,
        "master": memory.master_bytes,
        "optimizer": memory.optimizer_bytes,
        "activations": memory.activations_bytes,
    }
    left = (memory.peak_bytes or memory.total_bytes) - sum(parts.values())
    return {**parts, "gradients": min(max(left, 0), memory.gradients_bytes)}
