"""All claims, derived: what `tunesmith claims` prints, as rows, in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tunesmith.claims import arithmetic, counts
from tunesmith.claims.claim import Claim, Derived, shown
from tunesmith.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import RenderableType

CLAIMS: dict[str, Claim] = {claim.id: claim for claim in (*counts.COUNTS, *arithmetic.ARITHMETIC)}
NOTES = {**counts.NOTES, **arithmetic.NOTES}


def derive(ids: Iterable[str] = ()) -> list[Derived]:
    """The claims of these names, all without any, each with its number. Raises ConfigError for an unknown name."""
    chosen = list(ids) or list(CLAIMS)
    for name in chosen:
        if name not in CLAIMS:
            raise ConfigError(f"{name!r} is no claim; `tunesmith claims` lists them", hint=did_you_mean(name, CLAIMS))
    return [Derived(CLAIMS[name], CLAIMS[name].derive(), NOTES.get(name, "")) for name in chosen]


def summary(found: Sequence[Derived]) -> str:
    """How many agree."""
    agreeing = sum(one.agrees for one in found)
    return f"{len(found)} claims, {agreeing} agree, {len(found) - agreeing} do not"


def as_table(found: Sequence[Derived]) -> RenderableType:
    """The claims for the terminal, under the heading of each source."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("claim", no_wrap=True)
    for name in ("stated", "derived"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit", style="dim")
    table.add_column("agrees", no_wrap=True)
    table.add_column("note", style="dim")
    source = ""
    for one in found:
        if one.claim.source != source:
            source = one.claim.source
            table.add_row(Text(source, style="bold"))
        verdict = Text("yes", style="green") if one.agrees else Text("no", style="bold red")
        number = Text(shown(one.claim, one.value))
        table.add_row(f"  {one.claim.id}", one.claim.stated, number, one.claim.unit, verdict, one.note)
    return Group(table, Text(summary(found)))


def as_markdown(found: Sequence[Derived]) -> str:
    """The claims as a table of a page."""
    lines = ["| claim | source | stated | derived | unit | agrees | note |", "|---|---|---:|---:|---|---|---|"]
    for one in found:
        claim = one.claim
        verdict = "yes" if one.agrees else "**no**"
        number = shown(claim, one.value)
        lines.append(
            f"| `{claim.id}` | {claim.source} | {claim.stated} | {number} | {claim.unit} | {verdict} | {one.note} |"
        )
    return "\n".join([*lines, "", summary(found) + "."])
