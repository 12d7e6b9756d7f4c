"""The layouts of a cluster as a person reads them in the terminal: a row for each, what the first holds, what lacks.

How amounts are written is in `core.amounts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.core.amounts import in_bytes, in_count
from tunesmith.plan.bill import show_bill
from tunesmith.plan.show import bar

if TYPE_CHECKING:
    from rich.console import RenderableType

_PARTS = (
    ("weights", "weights_bytes", "cyan"),
    ("master weights", "master_bytes", "blue"),
    ("gradients", "gradients_bytes", "magenta"),
    ("optimizer", "optimizer_bytes", "yellow"),
    ("activations", "activations_bytes", "green"),
    ("gathered weights", "buffers_bytes", "cyan"),
)
_SENT = (
    ("all-reduce", "all_reduce"),
    ("reduce-scatter", "reduce_scatter"),
    ("all-gather", "all_gather"),
    ("tensor", "tensor"),
    ("pipeline", "pipeline"),
)
_MISSING = 5  # layouts that do not fit, shown


def show_layouts(found: dict[str, Any], width: int = 36) -> RenderableType:
    """The tables of a ranking given as its JSON; `width` is that of the longest bar in characters."""
    from rich.console import Group
    from rich.text import Text

    cluster = found["cluster"]
    tokens = found["rows_per_step"] * found["row_tokens"]
    head = (
        f"{cluster['devices']} devices ({cluster['nodes']}), {in_count(cluster['peak_flops'])}FLOP/s at their peak; "
        f"{tokens:,} tokens a step, rows of {found['row_tokens']:,}"
    )
    assumed = (
        f"assumed: {100 * cluster['compute_efficiency']:.3g} % of the peak while computing, "
        f"{100 * cluster['link_efficiency']:.3g} % of a link's bandwidth"
    )
    pieces: list[RenderableType] = [Text(head), Text(assumed, style="dim"), Text()]
    if found["layouts"]:
        pieces += [_ranked(found["layouts"]), Text(), *_first(found["layouts"][0], width)]
    else:
        pieces.append(Text("no layout fits", style="bold red"))
    if found.get("bill"):
        pieces.append(Text(show_bill(found["bill"])))
    pieces += _lacking(found)
    return Group(*pieces)


def _ranked(layouts: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layout", no_wrap=True)
    table.add_column("micro-batches", no_wrap=True)
    for name in ("step", "nothing hidden", "tokens/s", "MFU", "idle", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in layouts:
        table.add_row(
            name_of(one),
            _micro(one),
            f"{one['seconds']:.3g} s",
            f"{one['exposed_seconds']:.3g} s",
            f"{one['tokens_per_second']:,.0f}",
            f"{100 * one['mfu']:.1f} %",
            f"{100 * one['idle']:.1f} %",
            in_bytes(one["peak_bytes"]),
        )
    return table


def name_of(layout: dict[str, Any]) -> str:
    """A layout in few words: "data 8 zero3, tensor 2, pipeline 4 1f1b, full recompute"."""
    parts = [f"data {layout['data']}" + (f" {layout['shard']}" if layout["shard"] != "none" else "")]
    if layout["tensor"] > 1:
        parts.append(f"tensor {layout['tensor']}")
    if layout["pipeline"] > 1:
        chunks = f" x {layout['chunks']}" if layout["chunks"] > 1 else ""
        parts.append(f"pipeline {layout['pipeline']} {layout['schedule']}{chunks}")
    if layout["recompute"] != "none":
        parts.append(f"{layout['recompute']} recompute")
    return ", ".join(parts)


def _micro(layout: dict[str, Any]) -> str:
    least, most = min(layout["micro_batches"]), max(layout["micro_batches"])
    rows = layout["micro_rows"]
    return f"{most if least == most else f'{least}-{most}'} of {rows} row{'s' if rows > 1 else ''}"


def _first(layout: dict[str, Any], width: int) -> list[RenderableType]:
    """What a process of the fullest stage of the fastest layout holds, and what is sent."""
    from rich.table import Table
    from rich.text import Text

    stages = layout["stages"]
    fullest = max(stages, key=lambda stage: stage["total_bytes"])
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    largest = max(fullest[key] for _, key, _ in _PARTS)
    for name, key, colour in _PARTS:
        if fullest[key]:
            table.add_row(name, in_bytes(fullest[key]), Text(bar(fullest[key], largest, width), style=colour))
    room = f"of {in_bytes(fullest['room_bytes'])} that a device has for tensors"
    table.add_row("total", Text(in_bytes(fullest["total_bytes"]), style="bold"), Text(room, style="dim"))
    lines = [f"the first, on each device of stage {stages.index(fullest) + 1} of {len(stages)}:"]
    if len(stages) > 1:
        lines.append("blocks of the stages: " + " ".join(str(stage["blocks"]) for stage in stages))
    sent = [f"{in_bytes(layout['sent_bytes'][key])} {name}" for name, key in _SENT if layout["sent_bytes"][key]]
    told = "sent by a device in a step: " + (", ".join(sent) or "nothing")
    return [*map(Text, lines), table, Text(), Text(told)]


def _lacking(found: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    lacking = found["lacking"]
    shown = [f"  {name_of(one)}: lacks {_lack(one['lacks'])}" for one in lacking[:_MISSING]]
    counted = f"{found['fitting']} layouts fit, {len(lacking)} do not" + (":" if lacking else "")
    more = [f"  and {len(lacking) - _MISSING} more"] if len(lacking) > _MISSING else []
    return [Text(), *(Text(line, style="dim") for line in (counted, *shown, *more))]


def _lack(lacks: dict[str, int]) -> str:
    if "rows" in lacks:
        return f"{lacks['rows']:,} rows in a step"
    return f"{in_bytes(lacks['bytes'])} on a device"
