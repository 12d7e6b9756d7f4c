"""A plan as one HTML file that needs nothing else: memory over a run, by part, and under other layouts; the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.core.amounts import in_bytes, in_count, in_time
from tunesmith.evaluate import plots
from tunesmith.evaluate.report import render_page

PARTS = ("weights", "master", "optimizer", "gradients", "activations", "cache")
_TITLES = {"master": "master weights", "optimizer": "optimizer state", "cache": "keys and values"}
_WIDTH = 45  # places of the picture for a phase in which nothing moves
Parts = Mapping[str, int]


def plan_page(title: str, plan: dict[str, Any], line: Sequence[Parts], layouts: Sequence[tuple[str, Parts]]) -> str:
    """The page.

    Args:
        plan: as plan.json has it, with `data` and `fit` where there are any.
        line: bytes by part while the fullest micro-batch runs.
        layouts: a name, and bytes by part of one of its processes.
    """
    memory = plan["memory"]
    shown = [name for name in PARTS if memory.get(f"{name}_bytes")]
    largest = max((sum(parts.values()) for _, parts in layouts), default=0)
    page = {
        "title": title,
        "headline": f"{in_bytes(memory['resident_bytes'])} at the fullest moment",
        "timeline": _timeline(memory["phases"], line, shown),
        "parts": [
            {"index": index, "name": _TITLES.get(name, name), "size": in_bytes(memory[f"{name}_bytes"])}
            for index, name in enumerate(shown)
        ],
        "phases": [(name, in_bytes(sum(parts.values()))) for name, parts in memory["phases"].items()],
        "layouts": [(name, in_bytes(sum(parts.values())), _bar(parts, shown, largest)) for name, parts in layouts],
        "facts": _facts(plan),
        "lengths": plots.histogram(
            [(f"to {bound}", float(count)) for bound, count in plan.get("data", {}).get("lengths", {}).items()],
            "rows by tokens",
        ),
        "options": plan.get("fit", {}).get("options", []),
    }
    return render_page("plan.html", page)


def _timeline(phases: Mapping[str, Parts], line: Sequence[Parts], shown: Sequence[str]) -> Any:
    """Load, one micro-batch with its operations one after another, the step, and what comes between steps."""
    places: list[Parts] = [phases["load"]] * _WIDTH
    marks = [(0, "load"), (len(places), "one micro-batch")]
    places += line
    for name in ("step", "write", "score", "evaluate", "save"):
        if name in phases:
            marks.append((len(places), name))
            places += [phases[name]] * _WIDTH
    layers = [(name, [float(place.get(name, 0)) for place in places]) for name in shown]
    return plots.stacked_area("memory over a run", layers, marks, in_bytes)


def _bar(parts: Parts, shown: Sequence[str], largest: int) -> Any:
    sizes = [(name, float(parts.get(name, 0))) for name in shown]
    return plots.stacked_bar([*sizes, ("room", largest - sum(size for _, size in sizes))], empty_last=True)


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    total, trained = plan["parameters"]["total"], plan["parameters"]["trainable"]
    found = [
        ("parameters", f"{total:,}, {trained:,} of them trained"),
        ("steps, tokens", f"{plan['steps']:,}, {plan['tokens']:,}"),
        ("work", f"{in_count(plan['flops'])}FLOP"),
    ]
    if plan["seconds"] is not None:
        found.append(("time on this machine", in_time(plan["seconds"])))
    data = plan.get("data")
    if data:
        found.append(("epochs", f"{data['epochs']:.3g}"))
        found.append(("supervised share", f"{100 * data['supervised_share']:.0f} %"))
        found.append(("padding that packing saves", f"{100 * data['padding_share']:.0f} %"))
        found.append(("tokens a parameter", f"{data['tokens_a_parameter']:.2g}"))
    return found
