"""What a report claims: the scores of each model with their intervals, and the sentences that they allow.

The one idea: no sentence says more than the intervals do. The other parts of a report are in `story`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith.evaluate import plots

LOWER_IS_BETTER = ("loss", "perplexity")
_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "nist": "NIST",
    "meteor": "METEOR",
    "cider": "CIDEr",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "valid_json": "valid JSON",
}
_METHODS = {"lora": "LoRA", "full": "full fine-tuning", "top_layers": "its top layers", "bitfit": "BitFit"}


@dataclass(frozen=True)
class Row:
    """One model in the table of one metric.

    Attributes:
        name: of the model, as evaluation calls it.
        role: before (untuned, no examples), after (tuned) or other.
        value, low, high: the metric and its interval; the ends may be missing.
        n: held-out rows; 0 where not said.
    """

    name: str
    role: str
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Table:
    """One metric over the models.

    Attributes:
        name: of the metric, for people.
        lower: a smaller value is better.
        rows: the models that have a value.
        signature: how the metric was computed; may be empty.
    """

    name: str
    lower: bool
    rows: tuple[Row, ...]
    signature: str = ""

    @property
    def before(self) -> Row | None:
        return next((row for row in self.rows if row.role == "before"), None)

    @property
    def after(self) -> Row | None:
        return next((row for row in self.rows if row.role == "after"), None)

    @property
    def span(self) -> tuple[float, float]:
        """The smallest and largest number of the table: what its bars share."""
        ends = [end for row in self.rows for end in (row.value, row.low, row.high) if end is not None]
        return min(ends), max(ends)

    def number(self, value: float) -> str:
        """A value with as many decimals as the largest one of the table needs for three figures."""
        return score(value, max(map(abs, self.span)))

    def interval(self, row: Row) -> str:
        if row.low is None or row.high is None:
            return ""
        return f"{self.number(row.low)} to {self.number(row.high)}"

    def bar(self, row: Row) -> Markup:
        return plots.interval_bar(row.value, row.low, row.high, self.span)

    def better(self, one: float, other: float) -> bool:
        return one < other if self.lower else one > other


def headline(config: dict[str, Any], tables: Sequence[Table], losses: Sequence[plots.Point] = ()) -> list[str]:
    """What was tuned on what, how much better it became, and whether that may be chance: one to three sentences."""
    what = _what(config)
    for table in tables:
        before, after = table.before, table.after
        if before and after:
            rows = f" on {after.n:,} held-out rows" if after.n else ""
            change = f"{table.number(before.value)} to {table.number(after.value)}"
            return [f"{what}: {table.name} went from {change}{rows}.", *_certainty(table, before, after)]
    if len(losses) < 2:
        return [f"{what}."]
    return [f"{what}: its training loss went from {losses[0][1]:.3f} to {losses[-1][1]:.3f}."]


def score_tables(scores: dict[str, Any], asked: Sequence[str] = ()) -> list[Table]:
    """A table for each metric of eval.json; those asked for first come first, losses last."""
    models = [found for found in listed(scores.get("models")) if isinstance(found, dict)]
    names = [*asked, *(name for model in models for name in mapping(model.get("metrics")))]
    ordered = sorted(dict.fromkeys(names), key=lambda name: name in LOWER_IS_BETTER)
    tables = [_table(name, models) for name in ordered]
    return [table for table in tables if table.rows]


def role(name: str) -> str:
    """Which row of the table a model is: before (untuned, zero-shot), after (tuned) or other."""
    lower = name.lower()
    if any(word in lower for word in ("shot", "constant", "copy", "majority")) and "zero" not in lower:
        return "other"
    if any(word in lower for word in ("untuned", "base", "zero", "before")):
        return "before"
    return "after" if any(word in lower for word in ("tuned", "after", "adapted")) else "other"


def metric_name(metric: str) -> str:
    """A metric as its authors write it."""
    return _NAMES.get(metric, metric.replace("_", " "))


def score(value: float, largest: float | None = None) -> str:
    """A score with three figures or more, or with those that `largest` needs for three."""
    size = abs(value if largest is None else largest)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def mapping(found: Any) -> dict[str, Any]:
    """What was read where an object belongs; an empty one for anything else."""
    return found if isinstance(found, dict) else {}


def listed(found: Any) -> list[Any]:
    """What was read where a list belongs; an empty one for anything else."""
    return found if isinstance(found, list) else []


def number(found: Any) -> float | None:
    """What was read where a number belongs; None for anything else, infinity and NaN included."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _what(config: dict[str, Any]) -> str:
    model = str(config.get("model") or "The model")
    kind = str(mapping(config.get("method")).get("kind", ""))
    source = _source(config)
    method = f" with {_METHODS.get(kind, kind)}" if kind else ""
    return f"{Path(model).name if '/' in model else model} tuned{method}" + (f" on {source}" if source else "")


def _certainty(table: Table, before: Row, after: Row) -> list[str]:
    said = []
    interval = table.interval(after)
    if table.better(before.value, after.value):
        said.append("Tuning did not help here.")
    elif after.low is not None and after.high is not None and before.low is not None and before.high is not None:
        near, far = (after.high, before.low) if table.lower else (after.low, before.high)
        if table.better(near, far):
            said.append(f"The interval after tuning, {interval}, is clear of the one before: this is not chance.")
        else:
            said.append(f"The interval after tuning, {interval}, overlaps the one before: this may be chance.")
    others = [row for row in table.rows if row.role == "other"]
    if others:
        best = (min if table.lower else max)(others, key=lambda row: row.value)
        verb = "is behind at" if table.better(after.value, best.value) else "does as well or better with"
        said.append(f"The best alternative, {best.name}, {verb} {table.number(best.value)}.")
    return said


def _table(metric: str, models: Sequence[dict[str, Any]]) -> Table:
    rows, signature = [], ""
    for model in models:
        found = mapping(mapping(model.get("metrics")).get(metric))
        value, name = number(found.get("value")), str(model.get("name", "?"))
        if value is None:
            continue
        low, high = number(found.get("low")), number(found.get("high"))
        rows.append(Row(name, role(name), value, low, high, int(number(found.get("n")) or 0)))
        signature = signature or str(found.get("signature") or "")
    return Table(metric_name(metric), metric in LOWER_IS_BETTER, tuple(rows), signature)


def _source(config: dict[str, Any]) -> str:
    train = mapping(config.get("data")).get("train")
    entries = train if isinstance(train, list) else [train]
    names = [str(entry.get("path", "")) if isinstance(entry, dict) else str(entry) for entry in entries if entry]
    short = [Path(name).name if "/" in name else name for name in names]
    return " and ".join(short) if len(short) <= 2 else f"{short[0]} and {len(short) - 1} more"
