"""States of documents on the disk: one file, appended to, each record checked when it is read.

The one idea: the file is a cache and nothing else. A record that is damaged, cut off or missing is made again, a full
disk ends the writing and not the run, and a file that was made under other circumstances is begun anew.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.files import canonical_json, os_error

log = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sII")  # key, tokens, CRC-32 of all of the record but itself
KEY_BYTES = 16


class Kept:
    """A file of states.

    Args:
        budget: bytes that the file may have.
        facts: what the states depend on besides the key; a file with other facts is begun anew.
        width: numbers of a token.

    Attributes:
        bytes: of the file.
        is_full: nothing more is written.
    """

    def __init__(self, path: Path, budget: int, facts: Mapping[str, Any], width: int, dtype: torch.dtype) -> None:
        self.path, self.budget, self.width, self.dtype = path, budget, width, dtype
        self.places: dict[bytes, tuple[int, int]] = {}  # where a document's states begin, and its tokens
        self.begun = (canonical_json({**facts, "width": width, "dtype": str(dtype)}) + "\n").encode()
        self.bytes, self.is_full, self.handle = 0, False, -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._find()
        except OSError as error:
            self._give_up(error)

    def read(self, key: bytes, out: Tensor) -> bool:
        """Fills `out`, contiguous [tokens, width] in the file's dtype, with a document's states, if they are there."""
        place, tokens = self.places.get(key, (0, -1))
        if tokens != len(out):
            return False
        room, start = _raw(out), bytearray(_RECORD.size)
        try:
            size = os.preadv(self.handle, [start, room], place)
        except OSError:
            size = 0
        if size == len(start) + len(room) and _RECORD.unpack(start) == (key, tokens, _check(key, room)):
            return True
        del self.places[key]
        return False

    def write(self, key: bytes, states: Tensor) -> None:
        """Keeps a document's states, contiguous [tokens, width], while there is room."""
        raw = _raw(states)
        end = self.bytes + _RECORD.size + len(raw)
        if self.is_full:
            return
        if end > self.budget:
            self.is_full = True
            log.info("train.cache_trunk is used up: %d rows are kept, the others run anew each time", len(self.places))
            return
        try:
            self._put(_RECORD.pack(key, len(states), _check(key, raw)) + raw)
        except OSError as error:
            self._give_up(error)
            return
        self.places[key] = self.bytes, len(states)
        self.bytes = end

    def clear(self) -> None:
        """Forgets everything."""
        self.places.clear()
        try:
            os.ftruncate(self.handle, 0)
            self.bytes = 0
            self._put(self.begun)
            self.bytes = len(self.begun)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Lets go of the file, which stays."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle, self.is_full = -1, True
        self.places.clear()

    def _find(self) -> None:
        """Looks up what the file holds, up to where it is cut off; without the right beginning it is begun anew."""
        size = os.fstat(self.handle).st_size
        if os.pread(self.handle, len(self.begun), 0) != self.begun or size > self.budget:
            self.clear()
            return
        place, row = len(self.begun), self.width * self.dtype.itemsize
        while place + _RECORD.size <= size:
            key, tokens, _ = _RECORD.unpack(os.pread(self.handle, _RECORD.size, place))
            end = place + _RECORD.size + tokens * row
            if end > size:
                break
            self.places[key] = place, tokens
            place = end
        os.ftruncate(self.handle, place)
        self.bytes = place

    def _put(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self.handle, memoryview(data)[done:], self.bytes + done)

    def _give_up(self, error: OSError) -> None:
        """No more is written; what is there serves on."""
        self.is_full = True
        problem = os_error(self.path, error)
        log.warning("%s: %s; the run goes on, and no more states are kept", problem.where, problem.message)
        if self.handle >= 0:
            with suppress(OSError):
                os.ftruncate(self.handle, self.bytes)


def _raw(states: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    held: Any = states.detach().view(torch.uint8).numpy()
    return memoryview(held).cast("B")


def _check(key: bytes, raw: memoryview) -> int:
    return zlib.crc32(raw, zlib.crc32(key))
