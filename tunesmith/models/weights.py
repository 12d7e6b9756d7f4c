"""Safetensors files at the level of bytes: read the header, write tensor by tensor.

The one idea: a file of any size is checked from its header alone and written with one tensor in memory.
Needs neither torch nor the safetensors package, so `check` can use it. Loading weights into a model is in
`load.py`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError
from tunesmith.core.files import os_error, strict_loads

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
HEADER_LIMIT_BYTES = 100_000_000
_NAME_LIMIT = 1000


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: `start` and `end` are byte positions within the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]


def read_header(path: Path | str) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: the file is empty, cut off, not safetensors, or its header contradicts its size.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise _damaged(path, f"it has {size} bytes" if size else "it is empty")
            length = struct.unpack("<Q", start)[0]
            if length > HEADER_LIMIT_BYTES:
                raise _damaged(path, "it does not begin with a safetensors header")
            if 8 + length > size:
                least = 8 + length
                raise _damaged(path, f"it is cut off inside its header ({size} of at least {least} bytes)")
            raw = stream.read(length)
    except OSError as error:
        raise os_error(path, error) from error
    return _specs(path, raw, size)


def _specs(path: Path | str, raw: bytes, size: int) -> dict[str, TensorSpec]:
    try:
        header = strict_loads(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        specs = {name: _spec(name, entry, 8 + len(raw)) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header makes no sense ({error})") from error
    for spec in specs.values():
        if not len(raw) + 8 <= spec.start <= spec.end or spec.end - spec.start != spec.size_bytes:
            raise _damaged(path, f"the header contradicts itself about tensor {spec.name[:100]!r}")
    end = max((spec.end for spec in specs.values()), default=8 + len(raw))
    if size != end:
        state = "is cut off" if size < end else "has trailing bytes"
        raise _damaged(path, f"it {state}: {size} bytes, its header describes {end}")
    return specs


def _spec(name: str, entry: Any, base: int) -> TensorSpec:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if len(name) > _NAME_LIMIT:
        raise ValueError(f"a tensor name of {len(name)} characters")
    if any(not isinstance(number, int) or number < 0 for number in (*shape, start, end)):
        raise ValueError(f"tensor {name!r} has a size that is no natural number")
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown type {entry['dtype']!r}")
    return TensorSpec(name, entry["dtype"], tuple(shape), base + start, base + end)


def _damaged(path: Path | str, what: str) -> ModelError:
    return ModelError(f"damaged weights: {what}", where=str(path), hint="fetch or export the file again")


def write_tensors(path: Path | str, specs: Iterable[TensorSpec], contents: Iterator[Any]) -> None:
    """Writes a safetensors file; `contents` yields the raw little-endian bytes of each spec, in order.

    Raises:
        ValueError: a buffer has not the size its spec says.
        ResourceError: the disk is full or not writable.
    """
    ordered = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in ordered:
        offsets = [at, at + spec.size_bytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        at += spec.size_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # readers that map the file like tensors at multiples of eight
    try:
        with open(path, "wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            for spec, content in zip(ordered, contents, strict=True):
                if memoryview(content).nbytes != spec.size_bytes:
                    raise ValueError(f"{spec.name}: {memoryview(content).nbytes} bytes for {spec.size_bytes}")
                stream.write(content)
    except OSError as error:
        raise os_error(path, error) from error
