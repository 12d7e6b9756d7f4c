"""The likelihood of rankings under scores: Plackett-Luce with ties; of two answers it is Bradley-Terry.

The one idea: each answer in turn is picked among those that are not better than it. What the scores are, a head's or
those that a policy implies, is the objective's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Batch


def ranking_losses(scores: Tensor, batch: Batch, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of the ranking of each row, differentiable.

    For a row with scores s and ranks k: the sum over its answers i of

        log(sum of exp(s_j + m [k_j > k_i]) over all j with k_j >= k_i) - s_i

    (Plackett 1975, doi 10.2307/2346567; ties as in Breslow 1974, doi 10.2307/2529620: tied answers are each picked
    among all of them, so that they are pushed towards one score). Of two answers, the first of them better, that is
    -log sigmoid(s_1 - s_2 - m), the loss of Ouyang et al. 2022 (arXiv 2203.02155, eq. 1) with the margin of Touvron
    et al. 2023 (arXiv 2307.09288, eq. 2). With label smoothing e, (1 - e) of it and e of the same for the reversed
    ranking (Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
        scores: [documents], of the answers of all rows.
        batch: its `answers` and `ranks` say what the rows are.

    Returns:
        [rows], in the dtype of the scores.
    """
    ranks, rows = ranks_of(batch).to(scores.device), rows_of(batch, scores)
    found = _losses(scores, ranks, rows, margin)
    if not label_smoothing:
        return per_row(found, rows, batch)
    reversed_ = _losses(scores, -ranks, rows, margin)
    return per_row((1 - label_smoothing) * found + label_smoothing * reversed_, rows, batch)


def _losses(scores: Tensor, ranks: Tensor, rows: Tensor, margin: float) -> Tensor:
    """What each answer adds: [documents]."""
    together = rows[:, None] == rows[None]
    rivals = together & (ranks[None] >= ranks[:, None])
    shifted = scores[None] + margin * (ranks[None] > ranks[:, None]).to(scores.dtype)
    return shifted.masked_fill(~rivals, -float("inf")).logsumexp(1) - scores


def per_row(values: Tensor, rows: Tensor, batch: Batch) -> Tensor:
    """Sums [rows] of values [documents]."""
    return values.new_zeros(batch.row_count).index_add(0, rows, values)


def rows_of(batch: Batch, like: Tensor) -> Tensor:
    """int64 [documents]: the row that each answer is of, where `like` is."""
    import torch

    rows = [row for row, count in enumerate(batch.answers) for _ in range(count)]
    return torch.tensor(rows, device=like.device)


def ranks_of(batch: Batch) -> Tensor:
    """int64 [documents]. Raises DataError for rows whose answers are not compared."""
    if batch.ranks is None:
        raise DataError(f"rows without answers to compare: {', '.join(batch.rows[:5])}", where="data")
    return batch.ranks
