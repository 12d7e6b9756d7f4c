"""What layouts of data have in common: every process has a piece of each tensor, at a place that all know.

The one idea: checkpoints are read and written whole by the first process, so a layout need only say where pieces are
(`pieces.py`). What a process does with its pieces is `ddp.py`, `zero1.py`, `zero2.py` and `zero3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunesmith.parallel.layout import Single
from tunesmith.parallel.pieces import Place, collect, hand_out
from tunesmith.parallel.world import World


class Placed(Single):
    """Processes whose pieces are at `places`, by name."""

    world: World

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.places: dict[str, Place] = {}

    def room(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.world.is_first:
            return {}
        return {name: torch.empty(self.places[name].shape, dtype=piece.dtype) for name, piece in pieces.items()}

    def deal(self, whole: Mapping[str, Tensor], pieces: Mapping[str, Tensor]) -> None:
        hand_out(self.world, self.places, whole, pieces)


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
