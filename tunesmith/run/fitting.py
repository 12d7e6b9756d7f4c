"""The inverse questions of planning: what to change so that a run fits, and the largest of something that does.

The one idea: a candidate is the run's configuration with some keys changed, planned as any run; rows are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config, as_dict, build_config
from tunesmith.plan.fit import Change, Fitted, Planned, fit
from tunesmith.run.prepare import Prepared, prepare

if TYPE_CHECKING:
    from tunesmith.plan.plan import Plan


def fit_run(config: Config, room: int, prepared: Prepared, plan: Plan) -> Fitted:
    """The nearest changes with which a run fits into `room` bytes.

    Args:
        prepared, plan: of the run as it is.
    """
    planner = _planner(config, prepared)

    def planned(changes: Sequence[Change]) -> Planned:
        return planner(changes) if changes else _planned((), plan)

    return fit(as_dict(config), room, planned)


def largest_setting(config: Config, key: str, room: int) -> tuple[int, int]:
    """The largest value of a setting with which a run fits, and the bytes that it needs with it.

    Memory grows with each of these settings, along a line nearly: a few plans find the last that fits. The answer is 0
    where not even the smallest does.

    Args:
        key: `train.micro_batch_tokens`, `train.micro_batch_rows` or `data.max_length`.
    """
    plan = _planner(config)

    def needed(value: int) -> int:
        return plan([Change(_sized(config, key, value), 0, "")]).needed_bytes

    low, high = 1 if key.endswith("rows") else 16, 0
    at_low = needed(low)
    if at_low > room:
        return 0, at_low
    step = low * 16
    while not high:
        at = needed(step)
        if at > room:
            high, at_high = step, at
        elif step >= _LARGEST:
            return step, at
        else:
            low, at_low, step = step, at, step * 4
    for turn in range(8):
        if high - low <= max(1, low // 50):
            break
        share = (room - at_low) / max(1, at_high - at_low) if turn % 2 == 0 else 0.5
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        at = needed(middle)
        if at <= room:
            low, at_low = middle, at
        else:
            high, at_high = middle, at
    return low, at_low


_LARGEST = 1 << 20


def _planner(config: Config, prepared: Prepared | None = None) -> Callable[[Sequence[Change]], Planned]:
    """Plans the run with some changes; rows that were read for one serve others with the same `data` section."""
    from tunesmith.run.planning import plan_run

    read = {} if prepared is None else {_of_data(config): prepared}

    def planned(changes: Sequence[Change]) -> Planned:
        changed = build_config(_with(as_dict(config), changes))
        key = _of_data(changed)
        if key not in read:
            read[key] = prepare(changed, None if prepared is None else prepared.ahead)
        return _planned(changes, plan_run(replace(read[key], config=changed)))

    return planned


def _planned(changes: Sequence[Change], plan: Plan) -> Planned:
    return Planned(tuple(changes), plan.memory.resident_bytes, plan.seconds, plan.flops)


def _of_data(config: Config) -> str:
    return f"{config.data.model_dump_json()} {config.method.positions}"


def _with(raw: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    for change in changes:
        for key, value in change.settings:
            *path, last = key.split(".")
            held = raw
            for name in path:
                held = held[name]
            held[last] = value
    return raw


def _sized(config: Config, key: str, value: int) -> tuple[tuple[str, Any], ...]:
    """A setting and, where a step would be smaller than it, that of the step."""
    found: tuple[tuple[str, Any], ...] = ((key, value),)
    whole = key.replace("micro_batch_", "").replace("train.", "") + "_per_step"
    held = getattr(config.train, whole, None)
    if held is not None and value > held:
        found += ((f"train.{whole}", value),)
    return found
