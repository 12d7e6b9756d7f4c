"""What layouts of data have in common: every process has a piece of each tensor, at a place that all know.

The one idea: every process writes and reads its own numbers of a checkpoint, so a layout need only say where they are
(`pieces.py`). What a process does with its pieces is `ddp.py`, `zero1.py`, `zero2.py` and `zero3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunesmith.parallel.layout import Single
from tunesmith.parallel.pieces import Place, collect
from tunesmith.parallel.world import World


class Placed(Single):
    """Processes whose pieces are at `places`, by name."""

    world: World

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.places: dict[str, Place] = {}

    def wholes(self, pieces: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (piece.dtype, tuple(self.places[name].shape)) for name, piece in pieces.items()}

    def runs(self, name: str, piece: Tensor) -> Sequence[tuple[int, int]]:
        return [self.places[name].ranges[self.world.rank]]

    def cuts(self, name: str) -> Sequence[int]:
        place = self.places[name]
        return sorted({first for first, _ in place.ranges} - {0, place.shape.numel()})

    def keeps(self, name: str) -> bool:
        return self.world.is_first


class Sharded(Placed):
    """The same where no number is in the pieces of two processes."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        mine = [gradient for gradient in gradients if gradient.numel()]
        square = float(super().norm(mine)) ** 2 if mine else 0.0
        return torch.tensor(self.sum(square), dtype=torch.float64).sqrt()

    def clear(self) -> None:
        for piece in self.pieces.values():
            piece.grad = None

    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return collect(self.world, self.places, pieces)

    def keeps(self, name: str) -> bool:
        return True
