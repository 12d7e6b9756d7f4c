"""Supervised fine-tuning: the cross-entropy of every supervised token, summed.

Which tokens are supervised is decided where rows are encoded (`data/codec.py`); here they only count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tunesmith.core.errors import ConfigError
from tunesmith.objectives.objective import Objective, Policy

if TYPE_CHECKING:
    from tunesmith.core.types import Batch, Mean


class SFT(Objective):
    """Learn to write the completion: one unit a supervised token."""

    kind: Literal["sft"] = "sft"

    def check(self, config: dict[str, Any]) -> None:
        """Refuses encoders, which do not write. Raises ConfigError."""
        from tunesmith.models.families import family_of

        family = family_of(config)
        if family.kind == "encoder":
            raise ConfigError(
                f"sft learns to write text, and {family.name} is an encoder",
                where="objective",
                hint="objective: predict trains an encoder; to write, take a decoder such as smollm2-135m",
            )

    def weight(self, batch: Batch) -> float:
        """Supervised tokens of the batch."""
        return int(batch.targets.numel())

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum of -log p(target | what comes before it) over supervised tokens."""
        from tunesmith.core.types import Mean

        return Mean(policy.token_losses(batch).sum(), self.weight(batch))
