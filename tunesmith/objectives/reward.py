"""Reward models: a score for an answer to a prompt, learnt from pairs and rankings of answers.

One unit a row, whatever its number of answers: all pairs of a ranking are in one likelihood. The likelihood is
`ranking.py`; the score is read by `models/scores.py` where an answer ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tunesmith.core.errors import ConfigError
from tunesmith.objectives.objective import Objective, Policy
from tunesmith.objectives.ranking import per_row, ranking_losses, ranks_of, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.problem import Comparison, ProblemKind
    from tunesmith.core.types import Batch, Mean


class Reward(Objective):
    """Learn to score answers so that better ones score higher.

    Attributes:
        margin: by how much a better answer is to be ahead: a constant in place of the rating of Llama 2.
        label_smoothing: the share of rows whose order is taken to be wrong.
        centre: weight of the square of the sum of a row's scores, which keeps scores around 0 (Eisenstein et al. 2023,
            arXiv 2312.09244, eq. 5).
    """

    kind: Literal["reward"] = "reward"
    margin: Annotated[float, Field(ge=0, le=100)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    centre: Annotated[float, Field(ge=0, le=100)] = 0.0

    @property
    def predicts(self) -> ProblemKind:
        """A head with one output and no bias."""
        return "reward"

    @property
    def compares(self) -> Comparison:
        """Pairs and rankings."""
        return "rankings"

    def check(self, config: dict[str, Any]) -> None:
        """Refuses encoder-decoders, which read a prompt on one side and an answer on the other. Raises ConfigError."""
        from tunesmith.models.families import family_of

        family = family_of(config)
        if family.kind == "seq2seq":
            told = f"{family.name} is an encoder-decoder, of which no state has read prompt and answer"
            raise ConfigError(told, where="objective", hint="take a decoder or an encoder")

    def weight(self, batch: Batch) -> float:
        """Rows of the batch."""
        ranks_of(batch)
        return batch.row_count

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum over rows of the negative log-likelihood of their rankings."""
        from tunesmith.core.types import Mean

        return Mean(self.losses(policy.scores(batch)[:, 0], batch).sum(), self.weight(batch))

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """The loss of each row, [rows], from scores [documents]."""
        found = ranking_losses(scores, batch, self.margin, self.label_smoothing)
        if self.centre:
            found = found + self.centre * per_row(scores, rows_of(batch, scores), batch).square()
        return found
