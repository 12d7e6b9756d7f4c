"""Supervised fine-tuning: the cross-entropy of every supervised token, summed.

Which tokens are supervised is decided where rows are encoded (`data/codec.py`); here they only count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.objectives.objective import Objective, Policy

if TYPE_CHECKING:
    from tunesmith.core.types import Batch, Mean


class SFT(Objective):
    """Learn to write the completion: one unit a supervised token."""

    kind: Literal["sft"] = "sft"

    def weight(self, batch: Batch) -> float:
        """Supervised tokens of the batch."""
        return int(batch.targets.numel())

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum of -log p(target | what comes before it) over supervised tokens."""
        from tunesmith.core.types import Mean

        return Mean(policy.token_losses(batch).sum(), self.weight(batch))
