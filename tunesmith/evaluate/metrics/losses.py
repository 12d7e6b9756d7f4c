"""Loss and perplexity, by token over all rows: never a mean of batch means, so batching cannot change them.

Statistics come from the model (`tunesmith.evaluate.losses.row_losses`), not from completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from tunesmith.core.errors import DataError
from tunesmith.evaluate.metrics.metric import Metric

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats


class Loss(Metric):
    name = "loss"
    needs: ClassVar[Literal["completions", "predictions", "losses", "teacher"]] = "losses"
    higher_is_better = False

    @property
    def signature(self) -> str:
        return "nats per supervised token|by:token"

    def from_losses(self, totals: Sequence[float], tokens: Sequence[int]) -> Floats:
        """Float64 [rows, 2]: summed losses and supervised tokens of each row. Raises DataError for no token."""
        import numpy as np

        if not sum(tokens):
            raise DataError("no row has a supervised token to measure the loss of", hint="check data.eval")
        return np.stack([np.asarray(totals, np.float64), np.asarray(tokens, np.float64)], axis=1)

    def value(self, sums: Floats) -> Floats:
        return sums[..., 0] / sums[..., 1]


class Perplexity(Loss):
    name = "perplexity"

    @property
    def signature(self) -> str:
        return "exp of nats per supervised token|by:token"

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        return np.exp(super().value(sums))


class Divergence(Loss):
    name = "divergence"
    needs = "teacher"

    @property
    def signature(self) -> str:
        return "objective.divergence from the teacher, nats per supervised token|by:token"
