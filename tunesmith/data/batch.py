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

    A row with answers to compare is a document for each of them. Of examples with labels, `labels` holds one a
    document (int64 of labels, float32 of scores), or one a labelled token, whose places `sources` then are. Raises
    ValueError when there is no example.
    """
    if not examples:
        raise ValueError("a batch has at least one example")
    rows, examples = examples, [document for row in examples for document in row.documents()]
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    # a word is labelled at its own token; text is predicted from the token before
    back = 0 if examples[0].labels else 1
    for example in examples:
        start = len(ids)
        ids.extend(example.ids)
        positions.extend(range(len(example.ids)))
        # place 0 has no source: what comes before it is another document
        sources.extend(start + place - back for place in range(back, len(example.ids)) if example.supervised[place])
    tokens = torch.tensor(ids, dtype=torch.int64)
    predicting = torch.tensor(sources, dtype=torch.int64)
    return Batch(
        ids=tokens,
        positions=torch.tensor(positions, dtype=torch.int64),
        lengths=tuple(len(example.ids) for example in examples),
        sources=predicting,
        targets=tokens[predicting + back],
        rows=tuple(example.where for example in examples),
        labels=_labels(examples),
        types=_types(examples),
        prompts=tuple(_first_supervised(example) for example in examples),
        answers=tuple(len(row.lengths) for row in rows if row.lengths),
        ranks=_ranks(rows),
    )


def _ranks(rows: Sequence[Example]) -> torch.Tensor | None:
    ranks = [rank for row in rows for rank in row.ranks]
    return torch.tensor(ranks, dtype=torch.int64) if ranks else None


def _labels(examples: Sequence[Example]) -> torch.Tensor | None:
    labels = [label for example in examples for label in example.labels]
    if not labels:
        return None
    # places in a list of labels are Python's whole numbers, scores are its floats
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)


def _types(examples: Sequence[Example]) -> torch.Tensor | None:
    if not any(example.types for example in examples):
        return None
    found = [kind for example in examples for kind in example.types or [0] * len(example.ids)]
    return torch.tensor(found, dtype=torch.int64)


def _first_supervised(example: Example) -> int:
    return example.supervised.index(True) if True in example.supervised else len(example.ids)
