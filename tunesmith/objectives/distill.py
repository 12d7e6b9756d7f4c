"""Distillation: a student learns at every supervised token the whole distribution that a teacher has there.

Here are the settings; what a distance is, and how it is computed without all logits at once, is
`models/distances.py`. Who the teacher is, and what it said before, is `run/teaching.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tunesmith.core.errors import ConfigError
from tunesmith.objectives.objective import Objective, Policy

if TYPE_CHECKING:
    from tunesmith.core.types import Batch, Mean
    from tunesmith.models.distances import Distance


class Distill(Objective):
    """Learn to say what a teacher says (Hinton et al. 2015, arXiv 1503.02531): one unit a supervised token.

    Attributes:
        teacher: a model, or a run, with the same vocabulary.
        divergence: forward, KL(teacher || student); reverse, KL(student || teacher); or jsd, between both.
        beta: of jsd: the teacher's share in the middle.
        temperature: that both distributions are softened with; the distance counts its square.
        hard: share of the plain loss of the row's own token.
        top_k: so many of the teacher's most probable tokens are asked for before training, and kept on disk; all
            others count as one. None asks the teacher in every step for all.
        on_policy: share of the rows whose answer the student writes itself (Agarwal et al. 2023, arXiv 2306.13649).
        max_new_tokens: of such an answer, its end token included.
    """

    kind: Literal["distill"] = "distill"
    teacher: str = Field(min_length=1)
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float = Field(default=0.5, gt=0, lt=1)
    temperature: float = Field(default=1.0, gt=0, le=100)
    hard: float = Field(default=0.0, ge=0, lt=1)
    top_k: int | None = Field(default=None, ge=1, le=100_000)
    on_policy: float = Field(default=0.0, ge=0, le=1)
    max_new_tokens: int = Field(default=64, ge=1, le=100_000)

    @model_validator(mode="after")
    def _has_effect(self) -> Distill:
        if self.beta != 0.5 and self.divergence != "jsd":
            raise ValueError(f"beta has no effect with divergence {self.divergence}; it is of jsd")
        if self.max_new_tokens != 64 and not self.on_policy:
            raise ValueError("max_new_tokens has no effect with on_policy 0: the student writes nothing")
        if self.top_k and self.on_policy:
            raise ValueError("top_k keeps what the teacher says of rows that are known; on_policy makes new ones")
        return self

    @property
    def answered(self) -> int:
        """The longest answer of the student's own; 0 where it writes none."""
        return self.max_new_tokens if self.on_policy else 0

    @property
    def distance(self) -> Distance:
        """The divergence as a function of log-probabilities."""
        from tunesmith.models.distances import Distance

        return Distance(self.divergence, self.beta, self.temperature)

    def check(self, config: dict[str, Any]) -> None:
        """Refuses what does not write from left to right. Raises ConfigError."""
        from tunesmith.models.families import family_of

        family = family_of(config)
        if family.kind != "decoder" or not family.head:
            told = f"distill compares the next token of decoders, and {family.name} gives no such logits"
            raise ConfigError(told, where="objective", hint="take a decoder such as smollm2-135m")

    def weight(self, batch: Batch) -> float:
        """Supervised tokens of the batch."""
        return int(batch.targets.numel())

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum over supervised tokens of (1 - hard) temperature^2 distance + hard -log p(target)."""
        from tunesmith.core.types import Mean

        learnt, distances, losses = policy.taught(batch, self.distance, self.hard)
        facts = {"divergence": distances.detach().sum(), "hard_loss": losses.detach().sum()}
        return Mean(learnt.sum(), self.weight(batch), facts)
