"""The two values that cross every layer: a batch without padding, and a sum with its weight.

Objectives see a `Batch` and answer with a `Mean`; the trainer divides once, over all
that makes a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end. Each attends to itself only.

    Attributes:
        ids: int64 [tokens].
        positions: int64 [tokens], starting at 0 in each document.
        lengths: tokens of each document; they add up to `tokens`.
        sources: int64 [supervised], ascending: index of the token whose hidden state predicts the target.
        targets: int64 [supervised]: the token after each source, in the same document.
        rows: where each document came from, for messages.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    sources: Tensor
    targets: Tensor
    rows: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "positions", "sources", "targets")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Mean:
    """A sum over units (tokens, pairs, actions) and how many units there are; dividing is the trainer's.

    Attributes:
        total: float32 scalar, differentiable.
        weight: number of units in `total`.
    """

    total: Tensor
    weight: float
