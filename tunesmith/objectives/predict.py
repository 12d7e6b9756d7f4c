"""Prediction through a trained head: classification, regression, or a label for each word.

One unit a document, or a labelled word. How labels become numbers is `data/labels.py`, what the head sees is
`models/scores.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.core.errors import DataError
from tunesmith.objectives.objective import Objective, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.problem import ProblemKind
    from tunesmith.core.types import Batch, Mean


class Predict(Objective):
    """Learn to predict the label of a text.

    Attributes:
        problem: classification (cross-entropy), regression (squared error), or tokens (cross-entropy of each word).
    """

    kind: Literal["predict"] = "predict"
    problem: Literal["classification", "regression", "tokens"] = "classification"

    @property
    def predicts(self) -> ProblemKind:
        """The kind of head that this needs."""
        return self.problem

    def weight(self, batch: Batch) -> float:
        """Documents of the batch; of a batch of labelled words, their number."""
        return int(_labels(batch).numel())

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum over units of -log p(label), or of (prediction - value)^2."""
        from tunesmith.core.types import Mean

        return Mean(self.losses(policy.scores(batch), batch).sum(), self.weight(batch))

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """The loss of each unit, float32 [units], from scores [units, outputs]."""
        from torch.nn.functional import cross_entropy

        labels = _labels(batch).to(scores.device)
        if self.problem == "regression":
            return (scores[:, 0] - labels.to(scores.dtype)).square()
        return cross_entropy(scores, labels, reduction="none")


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise DataError(f"rows without a label: {', '.join(batch.rows[:5])}", where="data")
    return batch.labels
