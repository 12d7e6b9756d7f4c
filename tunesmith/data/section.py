"""The `data:` section: which rows, in which format, rendered how, cut where.

A mixture is a list of parts, each a path with a weight: how often an epoch sees it. What a path can
be is in `sources`, what a format can be in `formats`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from tunesmith.core.errors import did_you_mean
from tunesmith.core.section import Section
from tunesmith.data.formats import FORMATS


class Part(Section):
    """One source of a mixture.

    Attributes:
        path: bundled name, file, glob or hub id; `#500` behind it takes the first 500 rows.
        weight: how many times an epoch sees each row of it: 2 twice, 0.5 a seeded half of them.
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1000)


def _parts(value: Any) -> Any:
    if value is None:
        return ()
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple(Part(path=entry) if isinstance(entry, str) else entry for entry in listed)


def _written(parts: tuple[Part, ...]) -> Any:
    # the shortest spelling that reads back to the same parts
    plain = [part.path if part.weight == 1 else {"path": part.path, "weight": part.weight} for part in parts]
    if not plain:
        return None
    return plain[0] if len(plain) == 1 and isinstance(plain[0], str) else plain


Parts = Annotated[
    tuple[Part, ...],
    BeforeValidator(_parts, json_schema_input_type=str | Part | list[str | Part] | None),
    PlainSerializer(_written),
]
"""One path, a list of paths, or a list of `{path, weight}`."""


def _format(name: str) -> str:
    if name != "auto" and name not in FORMATS:
        close = did_you_mean(name, FORMATS)
        nearest = f"; {close}" if close else ""
        raise ValueError(f"{name!r} is no format; there are auto {' '.join(FORMATS)}{nearest}")
    return name


class DataSection(Section):
    """What the model is fed.

    Attributes:
        train: the rows to learn from.
        eval: the rows to judge on; empty where there are none.
        format: `auto` (found from the keys of the rows and stated), or the name of a format.
        template: `auto` (the model's own chat template), alpaca, dolly, plain, or a .jinja file.
        max_length: tokens of a row, prompt and completion; longer rows lose the start of their prompt.
        packing: rows are laid end to end, each with attention and positions of its own, without padding.
        skip_bad_rows: leaves out rows that are damaged or do not fit the format, and counts them.
    """

    train: Parts = ()
    eval: Parts = ()
    format: Annotated[str, AfterValidator(_format)] = "auto"
    template: str = "auto"
    max_length: int = Field(default=512, ge=2, le=10_000_000)
    packing: bool = True
    skip_bad_rows: bool = False
