"""Files that are not JSON lines, written once as JSON lines to a temporary file that has no name.

So there is one reader, `lines`, and memory does not grow with the file. What is wrong with a single row is
spooled in its place and raised when that row is read. Raises DataError naming file and line, ResourceError.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import IO, Any

from tunesmith.core.errors import DataError
from tunesmith.core.files import os_error
from tunesmith.data.lines import BAD, Lines

ROW_LIMIT_CHARACTERS = 1 << 28
_CHUNK_CHARACTERS = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
Spooled = tuple[bytes | DataError, int]  # a row or what is wrong with it, and its line (0: the file has none)


def spool(rows: Iterable[Spooled], name: str, *, numbered: bool) -> Lines:
    """Rows as a source.

    Args:
        numbered: say the number of the row, too: the kind has several rows a line, or no lines.
    """
    stream = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the source that reads it
    lines = array("q")
    try:
        for row, line in rows:
            stream.write((BAD + row.message.encode() if isinstance(row, DataError) else row) + b"\n")
            lines.append(line)
        stream.flush()
    except OSError as error:
        raise os_error(name, error) from error

    def where(index: int) -> str:
        place = f"{name}:{lines[index]}" if lines[index] else name
        return f"{place} (row {index + 1})" if numbered else place

    return Lines(stream, name, where=where, spooled=True)


def json_rows(stream: IO[bytes], name: str) -> Iterator[Spooled]:
    """The elements of a file that is one JSON list."""
    window = _Window(stream, name)
    window.expect("[")
    if window.peek() != "]":
        while True:
            window.peek()
            line = window.line
            yield window.element().replace("\n", " ").encode("utf-8", "surrogatepass"), line
            if window.peek() != ",":
                break
            window.expect(",")
    window.expect("]")
    if window.peek():
        raise DataError("there is more behind the end of the JSON list", where=f"{name}:{window.line}")


class _Window:
    """A moving part of a text, long enough for the element that is being read."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        # universal newlines: a raw line end is only ever white space in JSON
        self.text = io.TextIOWrapper(stream, "utf-8-sig")
        self.name, self.line, self.at, self.buffer, self.ended = name, 1, 0, "", False
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            space = _SPACE.match(self.buffer, self.at)
            self._advance(space.end() - self.at if space else 0)
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def expect(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            shown = repr(found) if found else "the end of the file"
            raise DataError(f"the JSON list needs {wanted!r} here, not {shown}", where=f"{self.name}:{self.line}")
        self._advance(1)

    def element(self) -> str:
        """The text of the element that begins here."""
        while True:
            try:
                _, end = self.decoder.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or not self._more():
                    found = self.buffer[self.at : end]
                    self._advance(end - self.at)
                    return found
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - 16
                if not unfinished or not self._more():
                    raise self._broken(error) from error
            except (RecursionError, ValueError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
                raise DataError(reason, where=f"{self.name}:{self.line}") from error

    def _broken(self, error: json.JSONDecodeError) -> DataError:
        line = self.line + self.buffer.count("\n", self.at, error.pos)
        begins = f" (in the row that begins at line {self.line})" if line != self.line else ""
        if error.pos >= len(self.buffer.rstrip()) or error.msg.startswith("Unterminated"):
            return DataError(f"the JSON list ends too early{begins}", where=f"{self.name}:{line}")
        return DataError(f"not JSON: {error.msg}{begins}", where=f"{self.name}:{line}")

    def _advance(self, count: int) -> None:
        self.line += self.buffer.count("\n", self.at, self.at + count)
        self.at += count

    def _more(self) -> bool:
        if self.ended:
            return False
        kept = self.buffer[self.at :]
        if len(kept) > ROW_LIMIT_CHARACTERS:
            raise DataError("a row of more than 268 million characters", where=f"{self.name}:{self.line}")
        try:
            # as much again, so that a long element is parsed a logarithmic number of times
            chunk = self.text.read(max(_CHUNK_CHARACTERS, len(kept)))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 ({error.reason})", where=f"{self.name}, after line {self.line}") from error
        self.buffer, self.at, self.ended = kept + chunk, 0, not chunk
        return not self.ended


def csv_rows(stream: IO[bytes], name: str) -> Iterator[Spooled]:
    """Lines of a CSV or TSV file as objects of text, named by its first line."""
    csv.field_size_limit(ROW_LIMIT_CHARACTERS)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=_delimiter(text), strict=True)
    try:
        header = next(reader, [])
        _check_header(header, name)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield json_line(dict(zip(header, cells, strict=True))), line
            elif cells:
                yield DataError(f"{len(cells)} cells, but the first line names {len(header)}"), line
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{name}:{reader.line_num}") from error
    except UnicodeDecodeError as error:
        where = f"{name}, after line {reader.line_num}"
        raise DataError(f"not UTF-8 ({error.reason})", where=where, hint="save it as UTF-8") from error


def _delimiter(text: io.TextIOWrapper) -> str:
    first = text.readline()
    text.seek(0)
    return max(",\t;", key=first.count)


def _check_header(header: list[str], name: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"two columns are called {twice[0]!r}", where=f"{name}:1")
    if header and not all(column.strip() for column in header):
        raise DataError("a column has no name", where=f"{name}:1", hint="the first line names the columns")


def text_rows(stream: IO[bytes], name: str) -> Iterator[Spooled]:
    """Each line that is not blank as one running text."""
    for line, raw in enumerate(stream, start=1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if not raw.strip():
            continue
        try:
            yield json_line({"text": raw.decode("utf-8").rstrip("\r\n")}), line
        except UnicodeDecodeError as error:
            yield DataError(f"not UTF-8 at byte {error.start + 1} of the line"), line


def arrow_rows(stream: IO[bytes], name: str) -> Iterator[Spooled]:
    """Rows of a Parquet file, or of an Arrow file or stream."""
    import pyarrow

    try:
        for batch in _batches(stream):
            yield from ((json_line(row), 0) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"the file is damaged: {str(error).splitlines()[0]}", where=name) from error


def _batches(stream: IO[bytes]) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    magic = stream.read(6)
    stream.seek(0)
    if magic.startswith(b"PAR1"):
        yield from parquet.ParquetFile(stream).iter_batches(batch_size=256)
    elif magic == b"ARROW1":
        opened = pyarrow.ipc.open_file(stream)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(stream)


def json_line(row: dict[str, Any]) -> bytes | DataError:
    """An object as one line of JSON, or why it cannot be one."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain).encode("utf-8", "surrogatepass")
    except ValueError:
        return DataError("holds NaN or infinity, which are not JSON")
    except TypeError as error:
        return DataError(str(error))


def _plain(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"holds a value of type {type(value).__name__}, which no format takes")
