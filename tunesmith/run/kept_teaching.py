"""What a teacher said, on disk: the most probable tokens of every supervised position, row by row.

The one idea: a row's key is its content and the file's name is the teacher and how it was asked, so that whatever is
there is right, from whichever run it comes; what is missing is asked for, and kept chunk by chunk.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith.core.errors import DataError, ResourceError
from tunesmith.core.files import cache_folder, canonical_json
from tunesmith.core.types import Likeliest

if TYPE_CHECKING:
    from tunesmith.data.encode import Example

_DIGEST_BYTES = 16
_ROOM_SECONDS = 60.0  # that another process may hold the file for


class KeptTeaching:
    """The file of one teacher, asked in one way.

    Args:
        facts: all that decides what it says, beside the row.
        count: tokens that are kept of each position.

    Raises ResourceError.
    """

    def __init__(self, facts: Mapping[str, Any], count: int) -> None:
        name = hashlib.sha256(canonical_json({**facts, "count": count}).encode()).hexdigest()[:32]
        self.path, self.count = cache_folder() / "teachers" / f"{name}.sqlite", count
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, timeout=_ROOM_SECONDS)
            with self.database:
                self.database.execute("CREATE TABLE IF NOT EXISTS said (row TEXT PRIMARY KEY, body BLOB NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise _unusable(self.path, error) from error

    def read(self, example: Example) -> Likeliest | None:
        """What was said of a row; None where it is not there, or damaged."""
        try:
            found = self.database.execute("SELECT body FROM said WHERE row = ?", (key_of(example),)).fetchone()
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error
        body = found[0] if found else b""
        digest, plain = body[:_DIGEST_BYTES], body[_DIGEST_BYTES:]
        rows = sum(example.supervised)
        split = 4 * rows * self.count
        if digest != _digest(plain) or len(plain) != split + 4 * rows * (self.count + 1):
            return None
        places = torch.from_numpy(np.frombuffer(plain[:split], "<i4").reshape(rows, self.count).copy())
        logprobs = torch.from_numpy(np.frombuffer(plain[split:], "<f4").reshape(rows, self.count + 1).copy())
        return Likeliest(places, logprobs)

    def write(self, examples: Sequence[Example], said: Likeliest) -> None:
        """Keeps what was said of some rows, whose positions lie one after the other: all of them, or none."""
        lines, start = [], 0
        for example in examples:
            end = start + sum(example.supervised)
            plain = said.places[start:end].numpy().astype("<i4").tobytes()
            plain += said.logprobs[start:end].numpy().astype("<f4").tobytes()
            lines.append((key_of(example), _digest(plain) + plain))
            start = end
        try:
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO said VALUES (?, ?)", lines)
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    def of(self, examples: Sequence[Example]) -> Likeliest:
        """What was said of the rows of a batch. Raises DataError where it is gone."""
        found = []
        for example in examples:
            said = self.read(example)
            if said is None:
                hint = "--resume asks the teacher again"
                raise DataError(f"what the teacher said of {example.where} is gone", where=str(self.path), hint=hint)
            found.append(said)
        return Likeliest(torch.cat([one.places for one in found]), torch.cat([one.logprobs for one in found]))

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self.database.close()


def key_of(example: Example) -> str:
    """A row's content: its tokens, and which of them are supervised."""
    content = np.asarray(example.ids, "<i8").tobytes() + np.asarray(example.supervised, "?").tobytes()
    return hashlib.sha256(content).hexdigest()


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_DIGEST_BYTES]


def _unusable(path: Path, error: Exception) -> ResourceError:
    hint = "delete it, or free some space; it is made again"
    return ResourceError(f"what the teacher says cannot be kept: {error}", where=str(path), hint=hint)
