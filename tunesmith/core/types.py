"""The values that cross every layer: a batch without padding, and a sum with its weight.

Objectives see a `Batch` and answer with a `Mean`; the trainer divides once, over all
that makes a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Actions:
    """What is known of tokens that a policy has written itself; each float32 [supervised], as `Batch.targets`.

    Attributes:
        advantages: how much better each was than what was to be expected.
        old: log-probabilities under the policy as it wrote them; None where it has not moved since.
        reference: the same under the reference; None where nothing holds to it.
        values, returns: what a value head expected when they were written, and what came; None without one.
    """

    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def to(self, device: torch.device | str) -> Actions:
        """The same on another device."""
        moved = {name: held.to(device) for name, held in vars(self).items() if held is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Likeliest:
    """What a teacher held most probable at each supervised position, kept from before.

    Attributes:
        places: int32 [supervised, count], ids of tokens.
        logprobs: float32 [supervised, count + 1], of these and, last, of all others together.
    """

    places: Tensor
    logprobs: Tensor

    def to(self, device: torch.device | str) -> Likeliest:
        """The same on another device."""
        return Likeliest(self.places.to(device), self.logprobs.to(device))


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
        actions: of the targets, where the policy has written them itself.
        likeliest: what a teacher says comes after each source, where that is known.
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
    actions: Actions | None = None
    likeliest: Likeliest | None = None

    @property
    def row_count(self) -> int:
        """Rows of the data, each of one document or of several answers."""
        return len(self.answers) or len(self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        names = ("ids", "positions", "sources", "targets", "labels", "types", "ranks", "actions", "likeliest")
        moved = {name: getattr(self, name) for name in names}
        return replace(self, **{name: held.to(device) for name, held in moved.items() if held is not None})


@dataclass(frozen=True)
class Mean:
    """A sum over units (tokens, pairs, actions) and how many units there are; dividing is the trainer's.

    Attributes:
        total: float32 scalar, differentiable.
        weight: number of units in `total`.
        facts: sums of what else was seen over the same units, for the log; scalars without gradient.
    """

    total: Tensor
    weight: float
    facts: Mapping[str, Tensor] = field(default_factory=dict)
