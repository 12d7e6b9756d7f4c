"""Safetensors files that several processes write and read together, each its own numbers of every tensor.

The one idea: where each number lies in such a file follows from names, dtypes and shapes alone. So the file is that of
one process, byte for byte, whoever wrote what of it, and no process ever holds a tensor that it has a part of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.train.scratch import let_go

# in the order in which safetensors lays them out: widest first
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MOST_BYTES = 2**30  # of one system call, which Linux cuts off at 2 GiB


@dataclass(frozen=True)
class Kind:
    """What a tensor is without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Part:
    """What a process has of a tensor.

    Attributes:
        held: its numbers.
        kind: of the whole.
        runs: where they lie in the whole, in their order: first and behind the last number of each run.
    """

    held: Tensor
    kind: Kind
    runs: Sequence[tuple[int, int]]

    def copied(self) -> Part:
        """The same with numbers that nobody changes, in the memory of the processor."""
        return replace(self, held=self.held.detach().to("cpu", copy=True))

    def buffers(self, flat: Tensor) -> Iterator[tuple[int, memoryview]]:
        """The bytes of each run in a flat tensor of such numbers, and at which byte of the whole it begins."""
        at, size = 0, flat.element_size()
        raw = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        for first, end in self.runs:
            yield first * size, raw[at * size : (at + end - first) * size]
            at += end - first


def whole(tensor: Tensor) -> Part:
    """A tensor that a process has all of."""
    return Part(tensor, kind_of(tensor), [(0, tensor.numel())])


def kind_of(tensor: Tensor) -> Kind:
    return Kind(tensor.dtype, tuple(tensor.shape))


def create(path: Path, kinds: Mapping[str, Kind]) -> None:
    """A file with room for tensors, all taken from the disk now. Raises OSError where it is full."""
    entries, end = {}, 0
    for name in sorted(kinds, key=lambda name: (list(_NAMES).index(kinds[name].dtype), name)):
        kind = kinds[name]
        begin, end = end, end + kind.dtype.itemsize * torch.Size(kind.shape).numel()
        entries[name] = {"dtype": _NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        # a disk that is full says so here, and not after training has gone on
        os.posix_fallocate(stream.fileno(), 0, 8 + len(text) + end)


class TensorFile:
    """A file that is there.

    Attributes:
        kinds: of its tensors, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
        self.kinds = {name: Kind(_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
        self._begins = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}

    def write(self, parts: Mapping[str, Part]) -> None:
        """Puts numbers in their places; when this returns they are on the disk. Raises OSError."""
        handle = os.open(self.path, os.O_WRONLY)
        try:
            for name, part in parts.items():
                flat = part.held.detach().cpu().contiguous().view(-1)
                for at, raw in part.buffers(flat):
                    _all(lambda raw, at: os.pwrite(handle, raw, at), raw, self._begins[name] + at)
                let_go(part.held)
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, parts: Mapping[str, Part]) -> None:
        """Fills tensors with their numbers. Raises OSError."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for name, part in parts.items():
                flat = torch.empty(part.held.numel(), dtype=part.held.dtype)
                for at, raw in part.buffers(flat):
                    _all(lambda raw, at: os.preadv(handle, [raw], at), raw, self._begins[name] + at)
                with torch.no_grad():
                    part.held.copy_(flat.view(part.held.shape))
                let_go(part.held)
        finally:
            os.close(handle)


def _all(call: object, raw: memoryview, at: int) -> None:
    """A system call that may do less than it is asked to, until all is done."""
    while raw:
        done: int = call(raw[:_MOST_BYTES], at)  # type: ignore[operator]
        if not done:
            raise OSError(0, "the file ends too early")
        raw, at = raw[done:], at + done
