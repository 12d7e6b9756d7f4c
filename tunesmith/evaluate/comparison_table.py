"""The statistics of a comparison for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

COEFFICIENTS = {
    "fleiss": "Fleiss' kappa",
    "krippendorff": "Krippendorff's alpha",
    "krippendorff_ordinal": "Krippendorff's alpha, ordinal",
}


def comparison_table(found: dict[str, Any]) -> RenderableType:
    """What `comparisons.statistics` gives as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for place, name in enumerate(columns):
            made.add_column(name, justify="left" if place == 0 else "right")
        return made

    parts: list[RenderableType] = [Text(counted(found["judgements"]))]
    versus = table("systems", "win", "tie", "loss", "wins and half of the ties", "pairs")
    for row in found["versus"]:
        name = Text(f"{row['system']} against {row['other']}")
        versus.add_row(name, *(percent(row[key]) for key in ("win", "tie", "loss", "win_rate")), str(row["n"]))
    if found["versus"]:
        parts += [Text(), versus]
    if found["strengths"]:
        elo = table("system", "Elo, with ties")
        for row in found["strengths"]["elo"]:
            elo.add_row(Text(row["system"]), f"{row['value']:.0f} {row['low']:.0f}..{row['high']:.0f}")
        parts += [Text(), elo]
    if rows := summary(found):
        measured = table("over all", "")
        for told, value in rows:
            measured.add_row(told, value)
        parts += [Text(), measured]
    people = table("annotator", "group", "judged", "skipped", "ties", "seconds", "with the others", "first shown wins")
    for row in found["annotators"]:
        people.add_row(
            Text(row["annotator"]), row["group"], str(row["judgements"]), str(row["skipped"]),
            "-" if row["ties"] is None else f"{100 * row['ties']:.0f} %", f"{row['median_seconds']:.1f}",
            percent(row["with_others"]), percent(row["first_shown"]),
        )  # fmt: skip
    if found["annotators"]:
        parts += [Text(), people]
    note = "behind each value its 95 % interval; the evidence is prompts, not pairs; both bad counts as a tie"
    parts.append(Text(note, style="dim"))
    return Group(*parts)


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Agreement and biases, as name and value; what cannot be said is left out."""
    agreement = found["agreement"]
    rows = [(told, number(agreement[name])) for name, told in COEFFICIENTS.items() if agreement[name]]
    for entry in agreement["groups"]:
        rows.append((f"agreement {'-'.join(entry['groups'])}, ties discounted", percent(entry["tie_discounted"])))
    biases = {"first_shown": "the better one was shown first", "longer": "the better one was the longer"}
    return rows + [(told, percent(found["biases"][name])) for name, told in biases.items() if found["biases"][name]]


def counted(judgements: dict[str, int]) -> str:
    """How many judgements there are, in a line."""
    told = f"{judgements['all']} judgements of {judgements['prompts']} prompts by {judgements['annotators']} annotators"
    parts = [
        f"{judgements[kind]} {name}" for kind, name in (("bad", "all bad"), ("skip", "skipped")) if judgements[kind]
    ]
    return f"{told} ({', '.join(parts)})" if parts else told


def percent(value: dict[str, Any] | None) -> str:
    """A share with its interval."""
    return _with_interval(value, 100, 0, " %")


def number(value: dict[str, Any] | None) -> str:
    """A coefficient with its interval."""
    return _with_interval(value, 1, 2, "")


def _with_interval(value: dict[str, Any] | None, scale: float, digits: int, unit: str) -> str:
    if value is None:
        return "-"
    ends = [value["low"], value["high"]]
    shown = "" if None in ends else f" {scale * ends[0]:.{digits}f}..{scale * ends[1]:.{digits}f}"
    return f"{scale * value['value']:.{digits}f}{unit}{shown}"
