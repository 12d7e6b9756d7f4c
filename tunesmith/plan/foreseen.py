"""The micro-batch that a plan traces: real rows, whose numbers are read before the trace, which has none.

The one idea: what depends on numbers and not on sizes alone, which beginnings documents share, is found with the real
ids and then told to the model (`models.shared.foreseen`); everything else of the batch is a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tunesmith.core.types import Batch
from tunesmith.models.shared import Compact, compacted, taken

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tunesmith.models.policy import Policy

T = TypeVar("T", Batch, "Known")


@dataclass(frozen=True)
class Known(Compact):
    """A `Compact`, and what its numbers say of the tokens that are supervised.

    Attributes:
        once: int64, places that are computed for these; None where no two of them share one.
        numbers: int64 [supervised], which of `once` each is.
    """

    once: Tensor | None
    numbers: Tensor

    def states(self, run: Callable[[Tensor | None], Tensor], wanted: Tensor | None) -> Tensor:
        if wanted is None or wanted.shape != self.numbers.shape:
            return taken(run(None), self.places if wanted is None else self.places[wanted])
        return run(self.places[wanted]) if self.once is None else taken(run(self.once), self.numbers)


@dataclass(frozen=True)
class Seen:
    """A micro-batch, and how it is computed where documents of it begin alike (None where each is by itself)."""

    batch: Batch
    compact: Known | None = None

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model runs on."""
        return len(self.batch.ids if self.compact is None else self.compact.tokens)

    def faked(self, mode: FakeTensorMode) -> Seen:
        """The same without its numbers."""
        compact = None if self.compact is None else _faked(self.compact, mode)
        return Seen(_faked(self.batch, mode), compact)


@dataclass(frozen=True)
class Met:
    """A micro-batch where it stands in a run.

    Attributes:
        seen: what it is.
        size_bytes: of its activations, as an estimate: tells which of several is likely the largest.
        has_gradients: those of an earlier micro-batch of the step are there.
        has_moments: the optimizer has made a step.
    """

    seen: Seen
    size_bytes: int = 0
    has_gradients: bool = False
    has_moments: bool = True


def seen(policy: Policy, batch: Batch) -> Seen:
    """A micro-batch of real rows as a policy in training mode will compute it."""
    compact = compacted(policy, batch)
    if compact is None:
        return Seen(batch)
    once, numbers = torch.unique(compact.places[batch.sources], return_inverse=True)
    shared = once if len(once) < len(numbers) else None
    return Seen(batch, Known(compact.tokens, compact.places, compact.segments, compact.owners, shared, numbers))


def _faked(value: T, mode: FakeTensorMode) -> T:
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    made: dict[str, Any] = {name: mode.from_tensor(one) for name, one in held.items() if isinstance(one, Tensor)}
    return replace(value, **made)
