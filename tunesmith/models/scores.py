"""Predictions: hidden states pooled per document (or taken at words) and read by the head of the row's adapter.

The one idea: each document is pooled by itself in float32, so that its score owes nothing to its neighbours. The
heads are `heads.py`; what they are trained on is `tunesmith.objectives.predict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.core.errors import AdapterError
from tunesmith.models.ports import attached_to

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.heads import Head
    from tunesmith.models.policy import Policy


def scores(policy: Policy, batch: Batch, head: Head | None = None) -> Tensor:
    """What the heads say, differentiable.

    Args:
        head: for all rows; by default that of each row's adapter.

    Returns:
        float32 (float64 for a float64 model) [documents, outputs]; for a problem of kind tokens [labelled tokens,
        outputs], in the order of `batch.sources`. Where heads differ in size, the missing outputs are -inf.

    Raises:
        AdapterError: a row's adapters have no head, or several.
    """
    documents = len(batch.lengths)
    heads = [head] * documents if head is not None else _heads(policy, documents)
    states, owners = _states(policy, batch, heads[0].pooling)
    if all(other is heads[0] for other in heads):
        return heads[0](states)
    if len({other.pooling for other in heads}) > 1:
        raise AdapterError("heads for words and heads for texts cannot answer rows of one batch")
    width = max(other.problem.outputs for other in heads)
    rows = [_one(heads[owner], state, width) for owner, state in zip(owners, states, strict=True)]
    return torch.stack(rows)


def _one(head: Head, state: Tensor, width: int) -> Tensor:
    found = head(state[None])[0]
    return torch.nn.functional.pad(found, (0, width - len(found)), value=-torch.inf)


def _heads(policy: Policy, documents: int) -> list[Head]:
    """The head of each document's adapters."""
    attached = attached_to(policy.model)
    return [_head_of(attached.heads, policy.route.of(row)) for row in range(documents)]


def _head_of(heads: dict[str, Head], adapters: tuple[str, ...]) -> Head:
    found = [name for name in adapters if name in heads]
    if not adapters:
        # methods that change the model itself have no name on the route; theirs is then the only head
        found = list(heads)
    if len(found) == 1:
        return heads[found[0]]
    asked = ", ".join(adapters) or "the base"
    told = f"several heads ({', '.join(found)})" if found else "no prediction head"
    raise AdapterError(f"{asked} has {told}", hint="load a run of objective predict, and name one adapter a row")


def _states(policy: Policy, batch: Batch, pooling: str) -> tuple[Tensor, list[int]]:
    """Pooled states [n, width], float32 or wider, and the document of each."""
    documents = list(range(len(batch.lengths)))
    if pooling == "start":
        from tunesmith.models.seq2seq import start_states

        return start_states(policy, batch), documents
    hidden = policy.hidden(batch)
    ends = torch.tensor(batch.lengths, device=hidden.device).cumsum(0)
    if pooling == "last":
        return hidden[ends - 1], documents
    if pooling == "token":
        # whose they are matters where heads differ, and a traced batch cannot tell
        owners = torch.searchsorted(ends, batch.sources, right=True).tolist() if policy.route.rows else []
        return hidden[batch.sources], owners
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.stack([part.mean(0) for part in wide.split(list(batch.lengths))]), documents
