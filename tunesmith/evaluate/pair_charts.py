"""Pictures of a run that compares answers: calibration, and accuracy by the difference of lengths.

They are made of `pairs` in eval.json, which `answers.described` has put together.
"""

from __future__ import annotations

from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.verdict import listed, mapping, number, score


def pair_charts(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Names and pictures; none where eval.json has no pairs."""
    found = mapping(scores.get("pairs"))
    odds = _points(found.get("calibration"), ("predicted",), "found")
    ideal = [(x, x) for x, _ in odds]
    lines = [plots.Series("as predicted", ideal, "faint"), plots.Series("found", odds)]
    calibration = plots.line_chart("Calibration", lines, score, "predicted %") if odds else ""
    lengths = [plots.Series("accuracy", _points(found.get("by_length"), ("low", "high"), "accuracy"))]
    by_length = plots.line_chart("Accuracy by length", lengths, score, "tokens longer")
    named = [("Calibration: how often the better answer is ahead", calibration)]
    named.append(("Accuracy by how much longer the better answer is", by_length))
    return [{"name": name, "picture": picture} for name, picture in named if picture]


def _points(rows: Any, x_keys: tuple[str, ...], y_key: str) -> list[plots.Point]:
    """Points in the order of x, which is the middle of its keys."""
    found = []
    for row in map(mapping, listed(rows)):
        xs, y = [number(row.get(key)) for key in x_keys], number(row.get(y_key))
        if y is not None and None not in xs:
            found.append((sum(x for x in xs if x is not None) / len(xs), y))
    return sorted(found)
