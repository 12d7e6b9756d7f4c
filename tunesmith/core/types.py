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
        labels: what is to be predicted, where a head predicts: int64 [documents], float32 [documents], or int64
            [labelled tokens]; in the last case `sources` are the very tokens that have a label.
        types: int64 [tokens], which of two texts a token is of, for tokenizers that say so.
        prompts: tokens of each document before its first supervised one, where they are known without looking.
        answers: documents of each row, where a row is several answers to one prompt.
        ranks: int64 [documents], of each answer within its row: lower is better, equal is a tie.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    sources: Tensor
    targets: Tensor
    rows: tuple[str, ...]
    labels: Tensor | None = None
    types: Tensor | None = None
    prompts: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    ranks: Tensor | None = None

    @property
    def row_count(self) -> int:
        """Rows of the data, each of one document or of several answers."""
        return len(self.answers) or len(self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name) for name in ("ids", "positions", "sources", "targets", "labels", "types", "ranks")
        }
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items() if tensor is not None})


@dataclass(frozen=True)
class Mean:
    """A sum over units (tokens, pairs, actions) and how many units there are; dividing is the trainer's.

    Attributes:
        total: float32 scalar, differentiable.
        weight: number of units in `total`.
    """

    total: Tensor
    weight: float
