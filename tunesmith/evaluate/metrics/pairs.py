"""Metrics of compared answers: how often the better of two has the higher score, on a scale of 100, and the loss.

The one idea: a row becomes the margins of its pairs, better less worse, which are resampled together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from tunesmith.evaluate.metrics.losses import Loss
from tunesmith.evaluate.metrics.metric import Metric

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats


class PairAccuracy(Metric):
    name = "accuracy"
    needs = "predictions"

    @property
    def signature(self) -> str:
        return "pair:the better scores higher|equal scores:half|by:pair|scale:100"

    def from_margins(self, rows: Sequence[Sequence[float]]) -> Floats:
        """Float64 [rows, 2]: pairs that are right, and pairs; rows without a pair add nothing."""
        import numpy as np

        right = [sum(0.5 * (margin > 0) + 0.5 * (margin >= 0) for margin in margins) for margins in rows]
        return np.array([right, [len(margins) for margins in rows]], dtype=np.float64).T

    def value(self, sums: Floats) -> Floats:
        return 100 * sums[..., 0] / sums[..., 1]


class PairLoss(Loss):
    """The loss of the objective."""

    @property
    def signature(self) -> str:
        return "nats of a row's order, as the objective has it|by:row"


def margins(scores: Sequence[float], ranks: Sequence[int]) -> list[float]:
    """Score of the better less that of the worse for each pair of a row's answers that are no tie.

    A single answer that is good is better than nothing, which scores 0, and a bad one is worse.
    """
    if len(scores) == 1:
        return [scores[0] if ranks[0] == 0 else -scores[0]]
    found = []
    for one, other in combinations(range(len(scores)), 2):
        if ranks[one] != ranks[other]:
            better, worse = (one, other) if ranks[one] < ranks[other] else (other, one)
            found.append(scores[better] - scores[worse])
    return found
