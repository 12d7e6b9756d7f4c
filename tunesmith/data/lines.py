"""Random access to the rows of a file that holds one JSON object a line, without holding the file.

The one idea: one pass finds where each line begins (8 bytes a row) and hashes what it reads; a row is read and
parsed when it is asked for. Other kinds of files are turned into such lines by `spool`; which file a name means
is in `sources`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from tunesmith.core.errors import DataError
from tunesmith.core.files import os_error, strict_loads

Progress = Callable[[int, int], None]  # (bytes read, bytes in all)
BAD = b"!"  # begins a spooled line that holds what is wrong with a row in place of the row
BLOCK_BYTES = 4 << 20
DEPTH_LIMIT = 64
SKIP_HINT = "mend the row, or set data.skip_bad_rows: true to leave such rows out and count them"
_BOM = b"\xef\xbb\xbf"
_KINDS = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its file holds it, and where that is, as in `train.jsonl:17`."""

    data: dict[str, Any]
    where: str


class Source(ABC):
    """Rows by number.

    Attributes:
        name: as the user named it.
        sha256: of what the source holds, as 64 hexadecimal digits.
        format: the format of its rows where that is known beforehand, else `auto`.
    """

    name: str
    sha256: str
    format: str = "auto"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> RawRow:
        """One row. Raises DataError, naming file and line, when it is not one JSON object."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The place of a row for messages, without reading it."""


class Lines(Source):
    """Rows of a file with one JSON object a line.

    Args:
        stream: the open file; it is read by position, so that processes may share it.
        name: for messages.
        where: number of a row -> its place for messages; by default `name:line`.
        spooled: the lines were written by us and may hold a complaint in place of a row.

    Raises: ResourceError; DataError when there is no row.
    """

    def __init__(
        self,
        stream: IO[bytes],
        name: str,
        *,
        where: Callable[[int], str] | None = None,
        spooled: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.name, self._stream, self._where, self._spooled = name, stream, where, spooled
        try:
            self._starts, self._blank, self.sha256 = _index(stream, progress)
        except OSError as error:
            raise os_error(name, error) from error
        if not len(self):
            raise DataError("no rows", where=name, hint="the file is empty")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> RawRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside range({len(self)})")
        start, end = self._starts[index], self._starts[index + 1]
        try:
            raw = os.pread(self._stream.fileno(), end - start, start)
        except OSError as error:
            raise os_error(self.name, error) from error
        where = self.where(index)
        if len(raw) != end - start:
            raise DataError("the file became shorter while it was read", where=where)
        if self._spooled and raw.startswith(BAD):
            raise DataError(raw[1:].decode().strip(), where=where, hint=SKIP_HINT)
        return RawRow(parse_row(raw, where), where)

    def where(self, index: int) -> str:
        """The place of a row for messages."""
        if self._where is not None:
            return self._where(index)
        return f"{self.name}:{index + 1 + bisect_right(self._blank, index)}"


class Subset(Source):
    """The first rows of a source."""

    def __init__(self, source: Source, rows: int) -> None:
        self.source, self.name, self.format = source, f"{source.name}#{rows}", source.format
        self.rows = min(rows, len(source))
        self.sha256 = hashlib.sha256(f"{source.sha256}#{self.rows}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> RawRow:
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} is outside range({self.rows})")
        return self.source[index]

    def where(self, index: int) -> str:
        return self.source.where(index)


class Chain(Source):
    """Several sources, one behind the other."""

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self.name, self.sources = name, tuple(sources)
        self._ends = [sum(map(len, self.sources[: count + 1])) for count in range(len(self.sources))]
        self.sha256 = hashlib.sha256("".join(source.sha256 for source in self.sources).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> RawRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside range({len(self)})")
        source, at = self._place(index)
        return source[at]

    def where(self, index: int) -> str:
        source, at = self._place(index)
        return source.where(at)

    def _place(self, index: int) -> tuple[Source, int]:
        which = bisect_right(self._ends, index)
        return self.sources[which], index - (self._ends[which - 1] if which else 0)


def parse_row(raw: bytes, where: str) -> dict[str, Any]:
    """One line as an object: strict JSON in UTF-8. Raises DataError saying what is wrong with it."""
    try:
        text = raw.decode("utf-8").strip()
        value: Any = strict_loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start + 1} of the row", where=where, hint=SKIP_HINT) from error
    except ValueError as error:
        raise DataError(_complaint(text, error), where=where, hint=SKIP_HINT) from error
    if problem := _problem(value, text):
        raise DataError(problem, where=where, hint=SKIP_HINT)
    return value


def _problem(value: Any, text: str) -> str:
    if not isinstance(value, dict):
        return f"a row is an object with keys, this is {describe(value)}"
    if text.count("{") + text.count("[") > DEPTH_LIMIT and _depth(value) > DEPTH_LIMIT:
        return f"nested more than {DEPTH_LIMIT} deep"
    if ("\\ud" in text or "\\uD" in text) and re.search("[\ud800-\udfff]", _texts(value)):
        return "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return ""


def describe(value: Any) -> str:
    """What sort of JSON value this is, for messages."""
    if value is None:
        return "null"
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        shown = repr(value)
        return f"{_KINDS[type(value)]} ({shown if len(shown) <= 40 else shown[:37] + '...'})"
    return _KINDS.get(type(value), type(value).__name__)


def _texts(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "".join(key + _texts(inner) for key, inner in value.items())
    return "".join(map(_texts, value)) if isinstance(value, list) else ""


def _complaint(text: str, error: ValueError) -> str:
    reason = str(error)
    if "digits" in reason and "limit" in reason:
        return "holds a whole number of more than 4,300 digits"
    if not isinstance(error, json.JSONDecodeError):
        return reason
    if error.pos >= len(text) or error.msg.startswith("Unterminated"):
        return f"the JSON ends too early ({error.msg.removesuffix(' starting at').lower()})"
    return f"not JSON: {error.msg} at character {error.pos + 1}, near {text[error.pos : error.pos + 20]!r}"


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner = [part for part in level if isinstance(part, dict | list)]
        level = [below for part in inner for below in (part.values() if isinstance(part, dict) else part)]
    return deepest - 1


def _index(stream: IO[bytes], progress: Progress | None) -> tuple[array[int], array[int], str]:
    """Where each row starts (and the last ends), how many rows each blank line follows, the hash of all bytes."""
    starts, blank = array("q"), array("q")
    digest = hashlib.sha256()
    total, position, start, empty = os.fstat(stream.fileno()).st_size, 0, 0, True
    newline = b"\n"
    stream.seek(0)
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        at = 0
        if position == 0:
            newline = b"\r" if b"\n" not in block and b"\r" in block else b"\n"  # old Macs end lines with CR alone
            at = start = 3 if block.startswith(_BOM) else 0
        while (end := block.find(newline, at)) >= 0:
            if empty and not block[at:end].strip():
                blank.append(len(starts))
            else:
                starts.append(start)
            at, empty = end + 1, True
            start = position + at
        empty = empty and not block[at:].strip()
        position += len(block)
        if progress is not None:
            progress(position, total)
    if not empty:
        starts.append(start)
    starts.append(position)
    return starts, blank, digest.hexdigest()
