"""Tensors side by side in flat buffers, so that a collective moves many at once.

Buckets go from the end of the model to its beginning, as its gradients come; names are put in the order of the numbers
in them. All buckets but those of one large tensor have about the same size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from tunesmith.parallel.pieces import Place

BUCKET_BYTES = 25_000_000  # of float32; as torch's DistributedDataParallel has it


@dataclass(frozen=True)
class Bucket:
    """Some tensors, end to end, and zeros to a multiple of the number of processes.

    Attributes:
        spans: first and behind the last number of each tensor, by name.
        part: numbers of one process's part.
        size: processes.
    """

    spans: Mapping[str, tuple[int, int]]
    part: int
    size: int

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer: [size x part]."""
        return torch.zeros(self.part * self.size, dtype=dtype, device=device)

    def put(self, flat: Tensor, name: str, tensor: Tensor) -> None:
        """Copies a tensor to its place."""
        first, last = self.spans[name]
        flat[first:last].copy_(tensor.detach().reshape(-1))

    def get(self, flat: Tensor, name: str) -> Tensor:
        """The numbers of a tensor, flat; a view."""
        return flat[slice(*self.spans[name])]

    def mine(self, rank: int, name: str) -> tuple[slice, slice]:
        """What a process has of a tensor: where it lies in its part, and in the tensor."""
        first, last = self.spans[name]
        start = min(max(first, rank * self.part), last)
        end = max(min(last, (rank + 1) * self.part), start)
        offset = rank * self.part
        return slice(max(0, start - offset), max(0, end - offset)), slice(start - first, end - first)

    def place(self, name: str, shape: torch.Size) -> Place:
        """Where a tensor is."""
        ranges = [self.mine(rank, name)[1] for rank in range(self.size)]
        return Place(shape, tuple((found.start, found.stop) for found in ranges))


def fill(
    tensors: Mapping[str, Tensor],
    size: int,
    most_bytes: int = BUCKET_BYTES,
    apart: Collection[str] = (),
    turns: Mapping[str, int] = MappingProxyType({}),
) -> list[Bucket]:
    """Buckets of tensors of one dtype each, which a collective wants, and of one turn.

    Args:
        tensors: whose sizes and dtypes count.
        size: processes.
        apart: names of tensors that have a bucket each, so that it is cut the same whatever other tensors there are.
        turns: as `layout.Single` has them.
    """
    buckets = [_bucket([name], tensors, size) for name in tensors if name in apart]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in apart}
    kinds = {name: (turns.get(name, 0), tensor.dtype) for name, tensor in tensors.items()}
    for kind in dict.fromkeys(kinds.values()):
        names = sorted((name for name in tensors if kinds[name] == kind), key=_natural, reverse=True)
        group: list[str] = []
        for name in names:
            if group and 4 * sum(tensors[held].numel() for held in [*group, name]) > most_bytes:
                buckets.append(_bucket(group, tensors, size))
                group = []
            group.append(name)
        if group:
            buckets.append(_bucket(group, tensors, size))
    return buckets


def _bucket(names: Sequence[str], tensors: Mapping[str, Tensor], size: int) -> Bucket:
    spans, end = {}, 0
    for name in names:
        spans[name] = (end, end + tensors[name].numel())
        end += tensors[name].numel()
    return Bucket(spans, -(-end // size), size)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Puts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
