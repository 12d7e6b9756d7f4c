"""Which part of every tensor each process has: one run of its numbers in their order, so that parts add up to it.

That holds for a flat buffer cut into equal parts and for rows of a matrix alike, and is why one format of checkpoints
serves all layouts: parts are laid end to end on the first process, and handed out from there, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def hand_out(
    world: World, places: Mapping[str, Place], whole: Mapping[str, Tensor], pieces: Mapping[str, Tensor]
) -> None:
    """Fills every process's pieces from the whole tensors of the first."""
    with torch.no_grad():
        for name, piece in pieces.items():
            place = places[name]
            if not world.is_first:
                part = torch.empty(piece.numel(), dtype=piece.dtype, device=piece.device)
                if piece.numel():
                    world.traffic.receive(part, 0)
                piece.copy_(part.view(piece.shape))
                continue
            flat = whole[name].reshape(-1)
            for peer in range(1, world.size):
                part = flat[place.mine(peer)]
                if part.numel():
                    world.traffic.send(part.to(piece.device).contiguous(), peer)
            piece.copy_(flat[place.mine(0)].view(piece.shape))
