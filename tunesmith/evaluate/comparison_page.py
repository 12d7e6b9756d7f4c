"""The statistics of a comparison as a page: report.html of its folder, and the live page while people judge."""

from __future__ import annotations

from typing import Any

from tunesmith.evaluate.comparison_table import counted, number, percent, summary
from tunesmith.evaluate.report import render_page


def comparison_page(found: dict[str, Any], title: str, *, live: bool = False) -> str:
    """The page of what `comparisons.statistics` gives; a live one asks for itself again every few seconds."""
    page = {
        "title": title,
        "live": live,
        "counted": counted(found["judgements"]),
        "versus": [
            {
                "name": f"{row['system']} against {row['other']}",
                "shares": [(name, percent(row[name])) for name in ("win", "tie", "loss")],
                "rate": percent(row["win_rate"]),
                "bar": [round(100 * (row[name] or {"value": 0})["value"], 2) for name in ("win", "tie", "loss")],
                "n": row["n"],
            }
            for row in found["versus"]
        ],
        "elo": [
            (row["system"], f"{row['value']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}")
            for row in (found["strengths"] or {"elo": []})["elo"]
        ],
        "summary": summary(found),
        "people": [
            {
                "name": row["annotator"],
                "cells": [
                    row["group"],
                    str(row["judgements"]),
                    str(row["skipped"]),
                    "-" if row["ties"] is None else f"{100 * row['ties']:.0f} %",
                    f"{row['median_seconds']:.1f}",
                    percent(row["with_others"]),
                    percent(row["first_shown"]),
                    percent(row["longer"]),
                ],
            }
            for row in found["annotators"]
        ],
        "pairs": [
            (" and ".join(row["annotators"]), number(row["cohen"]), percent(row["tie_discounted"]))
            for row in found["agreement"]["people"]
        ],
        "rubric": [(row["criterion"], row["system"], f"{row['mean']:.2f}", str(row["n"])) for row in found["rubric"]],
    }
    return render_page("comparison.html", page)
