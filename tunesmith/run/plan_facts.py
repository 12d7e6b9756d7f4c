"""What stands beside a plan: the data it is of, and how far the plans of past runs were off.

The one idea: each part is counted where it is known (`plan.data_need`, `plan.history`); here they are asked.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ConfigError
from tunesmith.plan.data_need import Need
from tunesmith.plan.history import history_of, interval
from tunesmith.run.largest import padding_share
from tunesmith.run.prepare import Prepared

if TYPE_CHECKING:
    from tunesmith.plan.plan import Plan

RUNS = Path("runs")


def facts(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """`data`, and `likely` where there are enough finished runs in `runs`: {bytes, seconds}, each [low, high]."""
    found = prepared.train_statistics
    labels = prepared.problem is not None
    need = Need(
        parameters=plan.parameters.total,
        tokens=plan.tokens,
        set_tokens=found.tokens,
        rows=found.kept,
        supervised_share=1.0 if labels else found.supervised_tokens / max(1, found.tokens),
        padding_share=padding_share(prepared),
        lengths={str(bound): found.lengths[bound] for bound in sorted(found.lengths)},
        flops=plan.flops,
    )
    return {"data": need.as_dict(), "likely": _likely(plan)}


def _likely(plan: Plan) -> dict[str, Any] | None:
    with suppress(ConfigError):
        history = history_of(RUNS)
        memory = interval(plan.memory.resident_bytes, history.memory())
        seconds = None if plan.seconds is None else interval(plan.seconds, history.time())
        if memory or seconds:
            return {"runs": len(history.pairs), "bytes": memory, "seconds": seconds}
    return None
