"""A model's predictions on held-out rows and their losses, leaving no trace in the model or in any random state.

What they are worth is in `metrics/labels.py`; a head is `tunesmith.models.heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.evaluate.losses import batches

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.problem import Problem
    from tunesmith.data.encode import Example
    from tunesmith.models.heads import Head
    from tunesmith.models.policy import Policy


@dataclass
class Predictions:
    """What a head says of some rows, in their order.

    Attributes:
        labels: names of the labels of each row, or its score as text.
        losses: summed loss of each row.
        units: labels in each row.
    """

    labels: list[tuple[str, ...]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    units: list[int] = field(default_factory=list)


def predict(
    policy: Policy,
    examples: Sequence[Example],
    problem: Problem,
    *,
    head: Head | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predicts every row; the arguments are those of `row_losses`, and `head` is that of `scores.scores`."""
    import torch

    from tunesmith.data.batch import to_batch
    from tunesmith.models.modes import evaluating
    from tunesmith.models.scores import scores
    from tunesmith.objectives.predict import Predict

    assert problem.kind != "reward", "answers are compared by `answers`"
    objective = Predict(problem=problem.kind)
    count = len(examples)
    found = Predictions([()] * count, [0.0] * count, [len(example.labels) for example in examples])
    done = 0
    with evaluating(policy.model), torch.no_grad():
        for rows in batches(examples, batch_tokens):
            batch = to_batch([examples[row] for row in rows]).to(policy.model.device)
            # a policy in parts is whole only while it is asked itself
            said = policy.scores(batch) if head is None else scores(policy, batch, head)
            losses = objective.losses(said, batch).double().cpu()
            units = [found.units[row] for row in rows]
            for row, part, loss in zip(rows, said.split(units), losses.split(units), strict=True):
                found.labels[row], found.losses[row] = _names(part, problem), float(loss.sum())
            done += len(rows)
            if progress is not None:
                progress(done, count)
    return found


def _names(scores: Tensor, problem: Problem) -> tuple[str, ...]:
    if problem.kind == "regression":
        return tuple(f"{score:.6g}" for score in scores[:, 0].tolist())
    return tuple(problem.labels[place] for place in scores.argmax(1).tolist())
