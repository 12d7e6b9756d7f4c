"""A sweep as one HTML file that needs nothing else: the table, score against parameters, and spectra."""

from __future__ import annotations

from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.report import render_page
from tunesmith.evaluate.sweep_table import columns, headline, interval, notes

Row = dict[str, Any]
GROUPS = {"budget": "within the budget", "reference": "for reference", "ranks": "table of ranks"}


def sweep_page(found: Row) -> str:
    """The page of sweep.json."""
    shown = columns(found)
    page = {
        "title": found["model"],
        "headline": headline(found),
        "partial": found["partial"],
        "columns": list(shown),
        "groups": [
            (GROUPS[why], [[tell(row) for tell in shown.values()] for row in found["rows"] if row["why"] == why])
            for why in dict.fromkeys(row["why"] for row in found["rows"])
        ],
        "notes": notes(found),
        "scatter": _scatter(found),
        "spectra": _spectra(found),
        "rank_tables": [
            {"targets": table["targets"], "ranks": {rank: interval(score) for rank, score in table["ranks"].items()}}
            for table in found["rank_tables"]
        ],
        "data": found["data"],
        "machine": found["machine"],
        "versions": found["versions"],
    }
    return render_page("sweep.html", page)


def _scatter(found: Row) -> Any:
    """Score against parameters, the shape of figure 2 of Hu et al. (2021, arXiv 2106.09685)."""
    dots = [
        plots.Dot(
            row["name"],
            max(1, row["parameters"] + found["head_parameters"]),
            row["score"]["mean"],
            row["score"]["low"],
            row["score"]["high"],
            "second" if row["why"] == "reference" else "main",
        )
        for row in found["rows"]
        if row["score"]
    ]
    return plots.scatter(f"{found['metric']} against parameters", dots, lambda y: f"{y:.3g}", found["base"]["score"])


def _spectra(found: Row) -> list[dict[str, Any]]:
    """For each row that changed matrices: the share of the energy in the first k singular values."""
    spectra = []
    for row in found["rows"]:
        known = row["spectrum"]
        if known:
            points = [(0.0, 0.0), *((float(k), 100 * share) for k, share in enumerate(known["shares"], 1))]
            series = [plots.Series(row["name"], points)]
            picture = plots.line_chart(f"{row['name']}, energy", series, lambda y: f"{y:.0f} %", "k")
            told = f"90 % in {known['median_rank']} of {known['full_rank']}, at most {known['largest_rank']}"
            spectra.append({"name": row["name"], "told": f"{told}; {known['matrices']} matrices", "picture": picture})
    return spectra
