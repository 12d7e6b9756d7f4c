"""Rows as tokens in one Arrow file, mapped into memory: what comes back is equal to what was encoded.

The one idea: the file ends with the SHA-256 of all that stands before it, so that one that is cut off or changed is
noticed before a row of it is used. Where such files lie and when one may be used is in `token_cache`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from tunesmith.data.encode import Dropped, Example

_KEPT, _LEFT_OUT, _UNKNOWN, _WRONG = range(4)  # states of a row; of the last two the file holds no tokens
_BATCH_ROWS, _BATCH_TOKENS = 4096, 1 << 20
_DIGEST_BYTES = 32
_GIVE_BACK_ROWS = 512  # each row touched maps 64 kB
# columns of one number a row, and of several (the bytes of a text): name -> code of the `array` module
_ONE = {"hash": "Q", "state": "B", "truncated_tokens": "q", "escaped": "q", "whole_labels": "B"}
_SEVERAL = {"ids": "i", "supervised": "B", "labels": "d", "types": "i", "lengths": "i", "ranks": "i", "reason": "B"}

Tokens = Example | Dropped | None


class TokenWriter:
    """Writes a file row by row, holding at most one batch of them. Raises OSError."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_file(self._sink, _schema())
        self._begin()

    def add(self, row_hash: int | None, tokens: Tokens) -> None:
        """Adds the next row.

        Args:
            row_hash: tells equal rows; None of a row that is wrong.
            tokens: what it is encoded as; None where it is not.
        """
        state = _WRONG if row_hash is None else _UNKNOWN if tokens is None else _KEPT
        kept = tokens if isinstance(tokens, Example) else _NOTHING
        if isinstance(tokens, Dropped):
            state = _LEFT_OUT
            self._values["reason"].frombytes(tokens.reason.encode())
        whole = all(isinstance(label, int) for label in kept.labels)
        for name, value in zip(_ONE, (row_hash or 0, state, kept.truncated_tokens, kept.escaped, whole), strict=True):
            self._values[name].append(value)
        for name in ("ids", "supervised", "labels", "types", "lengths", "ranks"):
            self._values[name].extend(getattr(kept, name))
        for name, offsets in self._offsets.items():
            offsets.append(len(self._values[name]))
        if len(self._values["hash"]) >= _BATCH_ROWS or len(self._values["ids"]) >= _BATCH_TOKENS:
            self._flush()

    @property
    def written_bytes(self) -> int:
        """How long the file is so far."""
        return int(self._sink.tell())

    def finish(self) -> None:
        """Completes the file and brings it to the disk."""
        self._flush()
        self._writer.close()
        self._sink.close()
        with open(self.path, "r+b") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
            stream.seek(0, os.SEEK_END)
            stream.write(digest)
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._sink.close()

    def _begin(self) -> None:
        self._values = {name: array(code) for name, code in {**_ONE, **_SEVERAL}.items()}
        self._offsets = {name: array("i", [0]) for name in _SEVERAL}

    def _flush(self) -> None:
        # made of buffers: pyarrow imports pandas to look at lists and at arrays of numpy
        import pyarrow as pa

        schema = _schema()
        columns = []
        for field in schema:
            data, rows = pa.py_buffer(self._values[field.name]), len(self._values["hash"])
            if field.name in _ONE:
                columns.append(pa.Array.from_buffers(field.type, rows, [None, data]))
                continue
            inner = pa.Array.from_buffers(field.type.value_type, len(self._values[field.name]), [None, data])
            offsets = pa.py_buffer(self._offsets[field.name])
            columns.append(pa.Array.from_buffers(field.type, rows, [None, offsets], children=[inner]))
        self._writer.write(pa.RecordBatch.from_arrays(columns, schema=schema))
        self._begin()


class TokenFile:
    """The rows of a finished file, by number.

    Raises ValueError where the file is damaged; OSError.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        with open(path, "rb") as stream:
            size = _checked(stream)
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        file = pyarrow.ipc.open_file(pyarrow.py_buffer(self._map).slice(0, size))
        if file.schema != _schema():
            raise ValueError("it holds other columns")
        self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._given = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def tokens(self, index: int, where: str) -> Tokens:
        """One row as it was encoded, at its place for messages; None where the file does not know it."""
        number = bisect_right(self._ends, index)
        at = index - (self._ends[number - 1] if number else 0)
        found = self._row(self._batches[number], at, where)
        self._given += 1
        if self._given % _GIVE_BACK_ROWS == 0:
            # what is mapped counts as memory of the process; the system keeps the pages all the same
            self._map.madvise(mmap.MADV_DONTNEED)
        return found

    def hashes(self) -> Iterator[int | None]:
        """The hash of each row; None of rows that were wrong."""
        for batch in self._batches:
            pairs = zip(batch.column("hash").to_pylist(), batch.column("state").to_pylist(), strict=True)
            yield from (None if state == _WRONG else value for value, state in pairs)

    def _row(self, batch: Any, at: int, where: str) -> Tokens:
        state, cut, escaped, whole = (batch.column(name)[at].as_py() for name in list(_ONE)[1:])
        if state in (_UNKNOWN, _WRONG):
            return None
        several = {name: batch.column(name)[at].as_py() for name in _SEVERAL}
        if state == _LEFT_OUT:
            return Dropped(bytes(several["reason"]).decode(), where)
        # places in a list of labels are whole numbers, and become tensors of such
        labels = map(int, several["labels"]) if whole else several["labels"]
        supervised = list(map(bool, several["supervised"]))
        more = (tuple(several[name]) for name in ("types", "lengths", "ranks"))
        return Example(several["ids"], supervised, where, cut, escaped, tuple(labels), *more)


_NOTHING = Example([], [])


def _schema() -> Any:
    import pyarrow as pa

    types = {"Q": pa.uint64(), "B": pa.uint8(), "q": pa.int64(), "i": pa.int32(), "d": pa.float64()}
    one = {name: types[code] for name, code in _ONE.items()}
    return pa.schema({**one, **{name: pa.list_(types[code]) for name, code in _SEVERAL.items()}})


def _checked(stream: IO[bytes]) -> int:
    """The length of a file without its digest; raises ValueError where the two do not belong together."""
    size = os.fstat(stream.fileno()).st_size - _DIGEST_BYTES
    if size <= 0:
        raise ValueError("it is cut off")
    digest, left = hashlib.sha256(), size
    while left and (block := stream.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if stream.read() != digest.digest():
        raise ValueError("its bytes are not those that were written")
    return size
