"""From what a user names to rows: a bundled set, a file, a glob, a hub id, each with `#500` for its first rows.

This decides what a name means and which reader it gets; the readers are `lines` and `spool`, bundled sets are
in `bundled`. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from tunesmith.core.errors import DataError, nearest
from tunesmith.data import bundled
from tunesmith.data.contents import complain, content_kind, open_regular
from tunesmith.data.hub import hub_rows
from tunesmith.data.lines import Chain, Lines, Progress, RawRow, Source, Subset
from tunesmith.data.spool import arrow_rows, csv_rows, json_rows, spool, text_rows

__all__ = ["RawRow", "Source", "Subset", "open_source"]

_SUFFIXES = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "arrow",
    ".arrow": "arrow", ".txt": "text", ".text": "text",
}  # fmt: skip
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+){0,2}")


def open_source(spec: str, progress: Progress | None = None) -> Source:
    """The rows that a name stands for.

    Args:
        spec: a bundled name (`alpaca-demo`, `alpaca-demo:test`); a file (.jsonl .json .csv .tsv .parquet .arrow
            .txt, also packed with gzip, bzip2 or xz); a glob; a hub id (`owner/name`, `owner/name:split`,
            `owner/name:config:split`). `#500` behind it takes the first 500 rows.
        progress: called with (bytes read, bytes in all) while a file is indexed.

    Raises:
        DataError: no such thing, no rows, or not what its name says.
        ResourceError: it cannot be read, or there is no network.
    """
    base, rows = _without_count(spec)
    source = _open(base, progress)
    return source if rows is None else Subset(source, rows)


def _without_count(spec: str) -> tuple[str, int | None]:
    base, mark, count = spec.rpartition("#")
    if not mark or _exists(spec):
        return spec, None
    if not (count.isascii() and count.isdigit() and int(count[:12]) > 0 and base):
        hint = "write the number of rows behind the mark, as in rows.jsonl#500"
        raise DataError(f"{count!r} is no number of rows", where=spec, hint=hint)
    return base, int(count[:12])


def _open(name: str, progress: Progress | None) -> Source:
    if name.partition(":")[0] in bundled.BUNDLED:
        path, form = bundled.open_part(name)
        source = Lines(open_regular(path, name), name, progress=progress)
        source.format = form
        return source
    if _exists(name):
        return open_file(name, progress)
    if any(mark in name for mark in "*?["):
        paths = sorted(path for path in glob.glob(_expanded(name), recursive=True) if Path(path).is_file())
        if not paths:
            raise DataError("no file matches", where=name)
        return Chain(name, [open_file(path, progress) for path in paths])
    if _HUB_ID.fullmatch(name) and not name.lower().endswith((*_SUFFIXES, *_PACKED_SUFFIXES)):
        return spool(hub_rows(name), name, numbered=True)
    raise _not_found(name)


def open_file(name: str, progress: Progress | None = None) -> Source:
    """The rows of one file, read as its ending says. Raises DataError, ResourceError."""
    stream = open_regular(Path(_expanded(name)), name)
    reader, kind = _reader(name), content_kind(stream, name)
    if kind == "empty":
        raise DataError("no rows", where=name, hint="the file is empty")
    if reader == "json" and kind == "jsonl":
        return Lines(stream, name, progress=progress)
    if reader == "json" and kind == "json":
        return spool(json_rows(stream, name), name, numbered=True)
    if reader == "arrow" and (kind in ("parquet", "arrow") or name.endswith(".arrow")):
        return spool(arrow_rows(stream, name), name, numbered=True)
    if reader == "csv" and kind == "text":
        return spool(csv_rows(stream, name), name, numbered=False)
    if reader == "text" and kind in ("text", "json", "jsonl", "object", "html"):
        return spool(text_rows(stream, name), name, numbered=False)
    raise complain(kind, name, {"json": "JSON", "csv": "CSV", "arrow": "Parquet or Arrow", "text": "text"}[reader])


def _reader(name: str) -> str:
    bare = name
    for suffix in _PACKED_SUFFIXES:
        bare = bare.removesuffix(suffix)
    # an unknown ending is read as JSON, and the message then says what the file holds
    return _SUFFIXES.get(Path(bare).suffix.lower(), "json")


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _exists(name: str) -> bool:
    try:
        return Path(_expanded(name)).exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a home folder that is not there
        return False


def _not_found(name: str) -> DataError:
    path = Path(_expanded(name))
    beside: list[str] = []
    try:
        if path.parent.is_dir():
            beside = [str(path.parent / found.name) for found in path.parent.iterdir()][:10_000]
    except (OSError, ValueError):
        beside = []
    close = nearest(str(path), beside) or nearest(name, [*bundled.BUNDLED, *bundled.names()])
    hint = f"did you mean {close}?" if close else f"bundled sets are {', '.join(bundled.BUNDLED)}"
    return DataError("not found", where=name, hint=hint)
