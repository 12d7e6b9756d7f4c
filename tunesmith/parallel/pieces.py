"""Which part of every tensor each process has: one run of its numbers in their order, so that parts add up to it.

That holds for a flat buffer cut into equal parts and for rows of a matrix alike; a matrix cut by columns is many runs.
It is why one format of checkpoints serves all layouts: each process writes and reads its runs of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.parallel.world import World


@dataclass(frozen=True)
class Place:
    """Where a tensor is.

    Attributes:
        shape: of the whole.
        ranges: of each process: first and behind the last of its numbers, in the order of the whole.
    """

    shape: torch.Size
    ranges: tuple[tuple[int, int], ...]

    def mine(self, rank: int) -> slice:
        """The range of one process."""
        return slice(*self.ranges[rank])


def collect(world: World, places: Mapping[str, Place], pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the first process, on the CPU; nothing on the others."""
    found = {}
    for name, piece in pieces.items():
        place = places[name]
        if not world.is_first:
            if piece.numel():
                world.traffic.send(piece.detach().contiguous().flatten(), 0)
            continue
        whole = torch.empty(place.shape, dtype=piece.dtype)
        flat = whole.view(-1)
        flat[place.mine(0)].copy_(piece.detach().flatten())
        for peer in range(1, world.size):
            first, last = place.ranges[peer]
            if last > first:
                part = torch.empty(last - first, dtype=piece.dtype, device=piece.device)
                world.traffic.receive(part, peer)
                flat[first:last].copy_(part)
        found[name] = whole
    return found


def runs_of_cut(
    shape: Sequence[int], axis: int, parts: int, rank: int, within: tuple[int, int]
) -> list[tuple[int, int]]:
    """Where a run of numbers of an equal part of a tensor lies in the whole.

    Args:
        shape: of the whole, which is cut into `parts` along `axis`.
        within: first and behind the last number, in the order of the part of `rank`.
    """
    stride = torch.Size(shape[axis:]).numel()  # numbers of the whole from one row to the next
    width = stride // parts
    found = []
    at, end = within
    while at < end:
        row, column = divmod(at, width)
        count = min(width - column, end - at)
        first = row * stride + rank * width + column
        found.append((first, first + count))
        at += count
    return found
