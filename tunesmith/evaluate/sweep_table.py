"""A sweep as a table: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.core.amounts import in_bytes
from tunesmith.evaluate.sweep_rows import higher_is_better

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = dict[str, Any]
_WHY = {"budget": "within the budget", "reference": "for reference, at their own size", "ranks": "table of ranks"}


def columns(found: Row) -> dict[str, Callable[[Row], str]]:
    """Heading to what a row says under it."""
    return {
        "method": lambda row: row["name"],
        "parameters": lambda row: f"{row['parameters']:,}",
        "of base": lambda row: f"{100 * row['share']:.3g} %",
        found["metric"]: _score,
        "forgetting": lambda row: _number(row["forgetting"], "{:+.3f}"),
        "tokens/s": lambda row: _number(row["tokens_per_second"], "{:,.0f}"),
        "peak": lambda row: _number(row["peak_bytes"], in_bytes),
        "latency": lambda row: _ratio(row, "unmerged"),
        "merged": lambda row: _ratio(row, "merged"),
        "size": lambda row: _number(row["bytes"], in_bytes),
        "CPU s/point": lambda row: _number(row["cpu_seconds_per_point"], "{:,.3g}"),
        "rank 90 %": _rank,
        "seeds": lambda row: f"{row['finished']} of {row['trials']}",
    }


def sweep_table(found: Row) -> RenderableType:
    """The rows of sweep.json for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = columns(found)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in shown:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    why = ""
    for row in found["rows"]:
        if row["why"] != why:
            why = row["why"]
            table.add_row(Text(_heading(found, why), style="bold"))
        table.add_row(*(Text(tell(row)) for tell in shown.values()))
    return Group(Text(headline(found), style="bold"), table, Text("\n".join(notes(found)), style="dim"))


def sweep_markdown(found: Row) -> str:
    """The same as Markdown, with the tables of a grid."""
    shown = columns(found)
    lines = [f"# {headline(found)}", ""]
    for why in dict.fromkeys(row["why"] for row in found["rows"]):
        lines += [f"## {_heading(found, why)}", "", _line(shown), "|---|" + "---:|" * (len(shown) - 1)]
        lines += [_line(tell(row) for tell in shown.values()) for row in found["rows"] if row["why"] == why]
        lines.append("")
    for table in found["rank_tables"]:
        ranks = table["ranks"]
        lines += [f"## LoRA on {table['targets']} by rank", "", _line(f"rank {rank}" for rank in ranks)]
        lines += ["|" + "---:|" * len(ranks), _line(interval(score) for score in ranks.values()), ""]
    return "\n".join(lines + [f"- {note}" for note in notes(found)]) + "\n"


def headline(found: Row) -> str:
    """What this is, and whether it is all of it."""
    budget = f", budget {found['budget']:,} parameters" if found["budget"] else ""
    partial = f" - PARTIAL: {found['finished']} of {found['trials']} trials" if found["partial"] else ""
    return f"Sweep of {found['model']}{budget}{partial}"


def notes(found: Row) -> list[str]:
    """How to read the table, and what is not in it."""
    base, metric = found["base"], found["metric"]
    better = "higher" if higher_is_better(metric) else "lower"
    score = "" if base["score"] is None else f"; {base['name']}: {base['score']:.4g}"
    lines = [
        f"{metric}: {better} is better, mean over seeds, behind it the 95 % interval of Student's t{score}",
        f"{found['steps']:,} steps of {found['rows_per_step']:.3g} rows each"
        + ("; the prediction head is not in the parameters" if found["head_parameters"] else "")
        + (f" ({found['head_parameters']:,} more)" if found["head_parameters"] else ""),
        "latency, merged: seconds over those of the base in turns, median; - where it does not apply",
        "CPU s/point: processor seconds of training for each point gained over the base",
        "rank 90 %: singular values with 90 % of the energy of the learnt change, median over matrices, of how many",
    ]
    if found["general"]:
        lines.append(f"forgetting: rise of the loss on {found['general']} (nats a token)")
    lines += [f"{name}: left out, {reason}" for name, reason in found["left_out"].items()]
    lines += [f"{row['name']}: {row['note']}" for row in found["rows"] if row["note"]]
    lines += [
        f"{row['name']}, seed {failure['seed']}: failed, {failure['error']}"
        for row in found["rows"]
        for failure in row["failures"]
    ]
    return lines


def interval(score: Row) -> str:
    """Mean and interval, with as many digits as they need."""
    digits = 1 if abs(score["mean"]) >= 10 else 3
    text = f"{score['mean']:.{digits}f}"
    return text if score["low"] is None else f"{text} ({score['low']:.{digits}f} to {score['high']:.{digits}f})"


def _heading(found: Row, why: str) -> str:
    return _WHY[why] + (f" of {found['budget']:,} parameters" if why == "budget" else "")


def _score(row: Row) -> str:
    if row["score"]:
        return interval(row["score"])
    return "failed" if row["failures"] else "-"


def _ratio(row: Row, way: str) -> str:
    found = (row["latency"] or {}).get(way)
    return f"{found['ratio']:.2f}" if found else "-"


def _rank(row: Row) -> str:
    found = row["spectrum"]
    return f"{found['median_rank']} of {found['full_rank']}" if found else "-"


def _number(value: float | None, shown: str | Callable[[float], str]) -> str:
    if value is None:
        return "-"
    return shown.format(value) if isinstance(shown, str) else shown(value)


def _line(cells: Any) -> str:
    found: Sequence[str] = list(cells)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in found) + " |"
