"""What an objective is: a sum over its units, and how many units a batch holds.

Neither is ever divided here: the trainer divides once, by the units of all micro-batches of a step, so that
cutting a step differently cannot change its loss. One objective a file; the table is in `objectives.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.core.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.problem import Comparison, ProblemKind
    from tunesmith.core.types import Batch, Mean
    from tunesmith.models.distances import Distance


class Policy(Protocol):
    """What an objective asks of the model that is being tuned."""

    def token_losses(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each target, float32 [supervised], differentiable."""
        ...

    def scores(self, batch: Batch) -> Tensor:
        """What a prediction head says, float32 [documents or labelled words, outputs], differentiable."""
        ...

    def reference_losses(self, batch: Batch) -> Tensor:
        """`token_losses` of the model as the stage received it: without dropout and without a gradient."""
        ...

    def valued(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`token_losses`, and what the value head expects before each target; both float32 [supervised]."""
        ...

    def at(self, temperature: float) -> Policy:
        """The same with its logits divided by a temperature."""
        ...

    def taught(self, batch: Batch, distance: Distance, hard: float) -> Tensor:
        """What is to be learnt of a teacher, the distance from it, and `token_losses`: [3, supervised].

        The first, (1 - hard) temperature^2 distance + hard loss, is differentiable.
        """
        ...


class Objective(Section):
    """What is minimised: the section of the configuration and the function in one.

    Attributes:
        kind: name in the table.
    """

    kind: str

    @property
    def predicts(self) -> ProblemKind | None:
        """The kind of prediction head that it trains; None for objectives over text."""
        return None

    @property
    def compares(self) -> Comparison | None:
        """Which answers a row has, for objectives that compare them; None for all others."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether it asks for the model as the stage received it."""
        return False

    @property
    def answered(self) -> int:
        """Tokens that the model may write itself after the prompt of a row; 0 where it learns the row's answer."""
        return 0

    @property
    def samples(self) -> bool:
        """Whether it learns from what the model writes itself."""
        return self.answered > 0

    @property
    def completions(self) -> int:
        """Completions of each prompt, where it learns from such."""
        return 1

    @property
    def parts(self) -> int:
        """Updates that one pass over what was written together is cut into."""
        return 1

    @property
    def passes(self) -> int:
        """How often each completion is used."""
        return 1

    @property
    def has_values(self) -> bool:
        """Whether a value head learns to expect the reward."""
        return False

    def check(self, config: dict[str, Any]) -> None:
        """Finds a model that this cannot train, from its config.json alone, without torch. Raises ConfigError."""

    def weight(self, batch: Batch) -> float:
        """Units in a batch, from the data alone: tokens, pairs, actions. 0 means that it teaches nothing."""
        raise NotImplementedError

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """The sum over the units of a batch, differentiable, and their number."""
        raise NotImplementedError
