"""Examples laid end to end as one batch of tensors; the only file of the data layer that needs torch.

The one idea: there is no padding, and no document's first token is predicted from the document before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.core.types import Batch
from tunesmith.data.encode import Example


def to_batch(examples: Sequence[Example]) -> Batch:
    """A Batch of these documents, int64 on the CPU: `ids` and `positions` [tokens], `sources` [supervised].

    Raises ValueError when there is no example.
    """
    if not examples:
        raise ValueError("a batch has at least one example")
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    for example in examples:
        start = len(ids)
        ids.extend(example.ids)
        positions.extend(range(len(example.ids)))
        # place 0 has no source: what comes before it is another document
        sources.extend(start + place - 1 for place in range(1, len(example.ids)) if example.supervised[place])
    tokens = torch.tensor(ids, dtype=torch.int64)
    predicting = torch.tensor(sources, dtype=torch.int64)
    return Batch(
        ids=tokens,
        positions=torch.tensor(positions, dtype=torch.int64),
        lengths=tuple(len(example.ids) for example in examples),
        sources=predicting,
        targets=tokens[predicting + 1],
        rows=tuple(example.where for example in examples),
    )
