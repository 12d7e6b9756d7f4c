"""A model's own losses on held-out rows, row by row, leaving no trace in the model or in any random state.

The metrics that these sums become are in `metrics/losses.py`; writing answers is `tunesmith.models.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Batch
    from tunesmith.data.encode import Example
    from tunesmith.models.policy import Policy

BATCH_TOKENS = 4096


def row_losses(
    policy: Policy,
    examples: Sequence[Example],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    of: Callable[[Batch], Tensor] | None = None,
    collate: Callable[[Sequence[Example]], Batch] | None = None,
) -> tuple[list[float], list[int]]:
    """Summed negative log-likelihood (nats) and number of supervised tokens of each example, in their order.

    Args:
        policy: the model under its route.
        examples: rows as training sees them.
        batch_tokens: at most so many at a time, padding counted, and at least one row; does not change the sums.
        progress: called with (done, all).
        of: what is summed instead of the policy's losses, [supervised].
        collate: examples as a Batch; default `data.batch.to_batch`.
    """
    import torch

    from tunesmith.data.batch import to_batch
    from tunesmith.models.modes import evaluating

    totals, tokens = [0.0] * len(examples), [0] * len(examples)
    done = 0
    with evaluating(policy.model), torch.no_grad():
        for rows in batches(examples, batch_tokens):
            batch = (collate or to_batch)([examples[row] for row in rows])
            losses = (of or policy.token_losses)(batch.to(policy.model.device)).double().cpu()
            ends = torch.tensor(batch.lengths).cumsum(0)
            owner = torch.searchsorted(ends, batch.sources, right=True)
            sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, owner, losses)
            counts = torch.bincount(owner, minlength=len(rows))
            for row, total, count in zip(rows, sums.tolist(), counts.tolist(), strict=True):
                totals[row], tokens[row] = total, count
            done += len(rows)
            if progress is not None:
                progress(done, len(examples))
    return totals, tokens


def batches(examples: Sequence[Example], batch_tokens: int) -> Iterator[list[int]]:
    """Places of examples of similar length, longest first, so that families which pad pad little."""
    order = sorted(range(len(examples)), key=lambda row: -len(examples[row].ids))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(examples[batch[0]].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
