"""How right plans were: predicted beside measured over the runs below a folder, and the interval that follows.

The one idea: a finished run holds its plan and what was measured; the ratios of one to the other over past runs say how
far the next plan is likely off. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tunesmith.core.amounts import in_bytes, in_time
from tunesmith.core.errors import ConfigError, DataError
from tunesmith.core.files import read_json

ENOUGH = 5  # runs before anything is said of the next one
_LOW, _HIGH = 0.1, 0.9


@dataclass(frozen=True)
class Pair:
    """One run: what was planned, what was measured."""

    run: str
    planned_bytes: int
    measured_bytes: int
    planned_seconds: float | None
    measured_seconds: float


@dataclass(frozen=True)
class Errors:
    """Measured over planned: its median, and between which values eight of ten runs lie."""

    runs: int
    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class History:
    """The runs below a folder that are finished and were planned."""

    pairs: tuple[Pair, ...]

    def memory(self) -> Errors | None:
        """Of the process at its fullest; None without runs."""
        return _errors([pair.measured_bytes / pair.planned_bytes for pair in self.pairs if pair.planned_bytes])

    def time(self) -> Errors | None:
        """Of the training; None without runs."""
        return _errors([pair.measured_seconds / pair.planned_seconds for pair in self.pairs if pair.planned_seconds])

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        memory, time = self.memory(), self.time()
        return {
            "runs": [asdict(pair) for pair in self.pairs],
            "memory": asdict(memory) if memory else None,
            "time": asdict(time) if time else None,
        }


def history_of(folder: Path) -> History:
    """Every finished run at or below a folder; damaged files are passed over. Raises ConfigError without a folder."""
    if not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), hint="runs are kept where out: says, in runs by default")
    found = [pair for path in sorted(folder.rglob("run.json")) if (pair := _pair(path.parent)) is not None]
    return History(tuple(found))


def interval(planned: float, errors: Errors | None) -> tuple[float, float] | None:
    """Between what the next run will lie if it is like eight of ten before; None where those were too few."""
    if errors is None or errors.runs < ENOUGH:
        return None
    return planned * errors.low, planned * errors.high


def show_history(history: History) -> list[str]:
    """Lines for people."""
    if not history.pairs:
        return ["no finished run with a plan there"]
    wide = max(len(pair.run) for pair in history.pairs)
    lines = [f"{'run':{wide}}  {'memory: planned':>15}  {'measured':>9}  {'time: planned':>13}  {'measured':>9}"]
    for pair in history.pairs:
        planned = in_time(pair.planned_seconds) if pair.planned_seconds else ""
        lines.append(
            f"{pair.run:{wide}}  {in_bytes(pair.planned_bytes):>15}  {in_bytes(pair.measured_bytes):>9}  "
            f"{planned:>13}  {in_time(pair.measured_seconds):>9}"
        )
    for name, errors in (("memory", history.memory()), ("time", history.time())):
        if errors:
            lines.append(
                f"{name}: measured / planned is {errors.middle:.2f} in the median of {errors.runs} runs, "
                f"{errors.low:.2f} to {errors.high:.2f} in eight of ten"
            )
    return lines


def _errors(ratios: Sequence[float]) -> Errors | None:
    if not ratios:
        return None
    return Errors(len(ratios), median(ratios), _quantile(ratios, _LOW), _quantile(ratios, _HIGH))


def _quantile(values: Sequence[float], share: float) -> float:
    """Between the nearest two values, in proportion."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _pair(folder: Path) -> Pair | None:
    try:
        plan, run = read_json(folder / "plan.json"), read_json(folder / "run.json")
        memory, measured = plan["memory"], run["measured"]
        planned = memory.get("resident_bytes") or memory["peak_bytes"] + memory["overhead_bytes"]
        # a run that was ended early did less than was planned
        share = measured["tokens"] / max(1, plan["tokens"])
        seconds = None if plan["seconds"] is None else float(plan["seconds"]) * share
        return Pair(str(folder), int(planned), int(measured["peak_bytes"]), seconds, float(measured["seconds"]))
    except (DataError, KeyError, TypeError, ValueError, AttributeError):
        return None
