"""Judged models as a table for the terminal: a row a model, a column a metric, each value with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType


def metrics_table(answer: dict[str, Any]) -> RenderableType:
    """The table of `{models: [{name, metrics: {m: {value, low, high, n, signature}}}]}`; the best values are bold."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    models = answer["models"]
    names = list(dict.fromkeys(name for model in models for name in model["metrics"]))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    columns = {name: [model["metrics"].get(name) for model in models] for name in names}
    best = {name: _best(name, scores) for name, scores in columns.items()}
    # metrics on a scale of 100 need one digit, losses and the like need more
    digits = {name: 1 if max(one["high"] for one in scores if one) >= 10 else 3 for name, scores in columns.items()}
    for model in models:
        cells = [_cell(model["metrics"].get(name), best[name], digits[name]) for name in names]
        table.add_row(Text(model["name"]), *cells)
    rows = {score["n"] for model in models for score in model["metrics"].values()}
    signatures = {name: score["signature"] for model in models for name, score in model["metrics"].items()}
    notes = [f"{' or '.join(map(str, sorted(rows)))} rows; behind each value its 95 % bootstrap interval"]
    notes += [f"{name}: {signature}" for name, signature in signatures.items()]
    return Group(table, Text("\n".join(notes), style="dim"))


def table_width(stream: TextIO) -> int | None:
    """Columns for a table: those of the terminal, or enough for a log file."""
    return None if stream.isatty() else 140


def _best(name: str, scores: list[dict[str, Any] | None]) -> float | None:
    from tunesmith.evaluate.metrics import METRICS

    values = [score["value"] for score in scores if score]
    if len(values) < 2:
        return None
    return max(values) if METRICS.load(name).higher_is_better else min(values)


def _cell(score: dict[str, Any] | None, best: float | None, digits: int) -> Any:
    from rich.text import Text

    if score is None:
        return Text("-", style="dim")
    value = Text(f"{score['value']:.{digits}f}", style="bold" if score["value"] == best else "")
    return value.append(f" {score['low']:.{digits}f}..{score['high']:.{digits}f}", style="dim not bold")
