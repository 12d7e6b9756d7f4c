"""A plan as a person reads it in the terminal: bars for memory by part and by phase, lines for the work.

How amounts are written is in `core.amounts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.core.amounts import in_bytes, in_count, in_time
from tunesmith.plan.choice import choice_line
from tunesmith.plan.data_need import show_need

if TYPE_CHECKING:
    from rich.console import RenderableType

_PARTS = (
    ("weights", "weights_bytes", "cyan"),
    ("master weights", "master_bytes", "blue"),
    ("gradients", "gradients_bytes", "magenta"),
    ("optimizer", "optimizer_bytes", "yellow"),
    ("activations", "activations_bytes", "green"),
    ("keys and values", "cache_bytes", "red"),
)

PHASES = ("load", "write", "score", "forward", "backward", "step", "evaluate", "save")
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show_plan(plan: dict[str, Any], width: int = 36) -> RenderableType:
    """The table of a plan given as plan.json; `width` is that of the longest bar in characters."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    memory = plan["memory"]
    largest = max((memory.get(key, 0) for _, key, _ in _PARTS), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name, key, colour in _PARTS:
        if memory.get(key):
            table.add_row(name, in_bytes(memory[key]), Text(bar(memory[key], largest, width), style=colour))
    table.add_row("total", Text(in_bytes(memory["total_bytes"]), style="bold"), Text(_notes(plan), style="dim"))
    lines = [choice_line(plan["recompute"])] if plan.get("recompute") else []
    lines += (
        [f"offloaded: {in_bytes(memory['offloaded_bytes'])} more, outside memory"]
        if memory.get("offloaded_bytes")
        else []
    )
    lines += [_spread(plan["layout"])] if plan.get("layout") else []
    lines += show_need(plan["data"]) if plan.get("data") else []
    phases = [show_phases(memory["phases"], width), Text()] if memory.get("phases") else []
    return Group(Text(_headline(plan)), Text(), table, Text(), *phases, Text(_work(plan)), *map(Text, lines))


def show_phases(phases: dict[str, dict[str, int]], width: int = 36) -> RenderableType:
    """A row for each phase of a run: what tensors take in it at most, as a bar of its parts in their colours."""
    from rich.table import Table
    from rich.text import Text

    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    largest = max(sums.values(), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name in (name for name in PHASES if name in phases):
        text, before = Text(), 0.0
        for _, key, colour in _PARTS:
            # each part begins where the one before ends, so that no rounding adds up
            after = before + phases[name].get(key.removesuffix("_bytes"), 0)
            cells = round(width * after / max(1, largest)) - round(width * before / max(1, largest))
            text.append("█" * cells, style=colour)
            before = after
        title = f"{name} (fullest)" if sums[name] == largest else name
        table.add_row(title, in_bytes(sums[name]), text)
    return table


def bar(value: float, largest: float, width: int) -> str:
    """A bar of eighths of a character; a value that is not zero shows at least one eighth."""
    if value <= 0 or largest <= 0:
        return ""
    eighths = max(1, round(8 * width * value / largest))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _headline(plan: dict[str, Any]) -> str:
    total, trained = plan["parameters"]["total"], plan["parameters"]["trainable"]
    share = 100 * trained / total if total else 0.0
    return f"{total:,} parameters, {trained:,} of them trained ({share:.3g} %)"


def _spread(layout: dict[str, Any]) -> str:
    held = "each holds all" if layout["shard"] == "none" else layout["shard"]
    kinds = [f"{name} {layout[name]}" for name in ("tensor", "pipeline") if layout.get(name, 1) > 1]
    if kinds:
        held = ", ".join([*kinds, *([] if layout["shard"] == "none" else [layout["shard"]])])
    sent = in_bytes(layout["sent_bytes"])
    return f"{layout['processes']} processes ({held}), each with this memory; each sends {sent} a step"


def _notes(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    notes = []
    if plan.get("activations") == "estimated":
        notes.append("activations estimated")
    if memory.get("resident_bytes"):
        notes.append(f"the process takes about {in_bytes(memory['resident_bytes'])} with Python and its libraries")
    elif memory.get("overhead_bytes"):
        notes.append(f"and about {in_bytes(memory['overhead_bytes'])} for Python and its libraries")
    return ", ".join(notes)


def _work(plan: dict[str, Any]) -> str:
    parts = [f"{plan['steps']:,} steps", f"{plan['tokens']:,} tokens", f"{in_count(plan['flops'])}FLOP"]
    if plan.get("seconds") is not None:
        parts.append(f"about {in_time(plan['seconds'])} on this machine")
    writing = plan.get("writing")
    if writing:
        took = "" if writing["seconds"] is None else f", {in_time(writing['seconds'])} of that time"
        parts.append(f"up to {writing['tokens']:,} tokens written, {writing['rows_at_once']} rows at once{took}")
    likely = plan.get("likely")
    if likely and likely["seconds"]:
        low, high = map(in_time, likely["seconds"])
        parts.append(f"{low} to {high} by {likely['runs']} past runs")
    return ", ".join(parts)
