"""What a model thinks of compared answers on held-out rows, leaving no trace in the model or in any random state.

Metrics are in `metrics/pairs.py`; here are the scores, and what a report shows of them: accuracy by the difference
of the answers' lengths, and whether the odds that scores give are those that are found (calibration).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tunesmith.evaluate.losses import batches
from tunesmith.evaluate.metrics.pairs import margins

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Batch
    from tunesmith.data.encode import Example
    from tunesmith.models.policy import Policy

BINS, LEAST_IN_BIN = 10, 8

Scorer = Callable[["Policy", "Batch"], "tuple[Tensor, Tensor, Tensor | None]"]
"""Scores [documents], losses [units], and log p of each answer [documents] where there is one."""


@dataclass
class Opinions:
    """Scores, losses and chances of the answers of some rows, in their order.

    Attributes:
        scores: of each answer of each row.
        losses: summed loss of each row; `units` is what they are divided by.
        chances: log p of each answer of each row; empty for a head.
    """

    scores: list[tuple[float, ...]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    chances: list[tuple[float, ...]] = field(default_factory=list)


def opinions(
    policy: Policy,
    examples: Sequence[Example],
    scorer: Scorer,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Opinions:
    """What a model thinks of the answers of every row; the arguments are those of `losses.row_losses`."""
    import torch

    from tunesmith.data.batch import to_batch
    from tunesmith.models.modes import evaluating

    count, done = len(examples), 0
    found = Opinions([()] * count, [0.0] * count, [1] * count, [()] * count)
    with evaluating(policy.model), torch.no_grad():
        for rows in batches(examples, batch_tokens):
            batch = to_batch([examples[row] for row in rows]).to(policy.model.device)
            scores, losses, chances = scorer(policy, batch)
            parts = list(batch.answers)
            units = parts if len(losses) == sum(parts) else [1] * len(parts)
            split = losses.double().cpu().split(units)
            for place, row in enumerate(rows):
                found.losses[row], found.units[row] = float(split[place].sum()), units[place]
                found.scores[row] = _of(scores, parts, place)
                found.chances[row] = () if chances is None else _of(chances, parts, place)
            done += len(rows)
            if progress is not None:
                progress(done, count)
    return found


def _of(values: Tensor, parts: list[int], place: int) -> tuple[float, ...]:
    start = sum(parts[:place])
    return tuple(values[start : start + parts[place]].double().tolist())


def described(found: Opinions, examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy by difference of lengths (tokens of the better answer less those of the worse), and calibration.

    Bins hold about equally many pairs. `calibration` compares the odds that scores give, sigmoid of the margin, with
    how often the answer that scores higher is the better one.
    """
    pairs = []
    for scores, example in zip(found.scores, examples, strict=True):
        lengths = [float(document.answer_tokens) for document in example.documents()]
        if len(scores) > 1:
            longer = margins(lengths, example.ranks)
            pairs += list(zip(margins(scores, example.ranks), longer, strict=True))
    by_length = [
        {"low": part[0][1], "high": part[-1][1], "pairs": len(part), "accuracy": _right([m for m, _ in part])}
        for part in _bins(sorted(pairs, key=lambda pair: pair[1]))
    ]
    calibration = [
        {
            "predicted": 100 * sum(1 / (1 + math.exp(-abs(m))) for m, _ in part) / len(part),
            "pairs": len(part),
            "found": _right([m for m, _ in part]),
        }
        for part in _bins(sorted(pairs, key=lambda pair: abs(pair[0])))
    ]
    return {"by_length": by_length, "calibration": calibration}


def _bins(pairs: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    count = max(1, min(BINS, len(pairs) // LEAST_IN_BIN))
    ends = [round(place * len(pairs) / count) for place in range(count + 1)]
    return [pairs[low:high] for low, high in pairwise(ends) if high > low]


def _right(found: list[float]) -> float:
    return 100 * sum(0.5 * (m > 0) + 0.5 * (m >= 0) for m in found) / len(found)
