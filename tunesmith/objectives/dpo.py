"""Direct preference optimisation and its relatives: the policy learns from pairs without a reward model.

The one idea: how much likelier the policy has made an answer than the reference, the model as the stage received it,
is a reward. One unit a row (of `kto` an answer); policy and reference are one model under two routes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.core.errors import ConfigError
from tunesmith.objectives.objective import Objective, Policy
from tunesmith.objectives.ranking import per_row, ranking_losses, ranks_of, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.problem import Comparison
    from tunesmith.core.types import Batch, Mean


class DPO(Objective):
    """Learn to prefer the chosen answer.

    With h = log p(answer) - log p_reference(answer), both summed over the answer's tokens, end token included, and
    b = beta:

    - sigmoid: -log sigmoid(b (h_chosen - h_rejected)), Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); of rankings
      the Plackett-Luce likelihood of b h (eq. 20).
    - ipo: (h_chosen - h_rejected - 1 / 2b)^2, Azar et al. 2024 (arXiv 2310.12036, eq. 17), with h divided by the
      tokens of its answer, as its authors computed it and trl does.
    - kto: 1 - sigmoid(b h) of an answer that is good, 1 - sigmoid(-b h) of one that is bad, Ethayarajh et al. 2024
      (arXiv 2402.01306, eq. 8) with the reference point at 0: its estimate from other rows of a micro-batch would make
      the loss depend on how a step is cut.
    - orpo: -mean log p(chosen) - b log sigmoid(log odds(chosen) - log odds(rejected)), odds p / (1 - p) of the
      geometric mean p of the tokens' probabilities, Hong et al. 2024 (arXiv 2403.07691, eq. 6 and 7); no reference.

    Attributes:
        beta: how closely the policy is held to the reference; of ipo 1 / 2 beta is the margin aimed at, of orpo it is
            the weight of the odds.
        loss: sigmoid, ipo, kto or orpo.
        label_smoothing: the share of rows whose order is taken to be wrong; of sigmoid alone.
    """

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    variant: Annotated[Literal["sigmoid", "ipo", "kto", "orpo"], Field(alias="loss")] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _has_effect(self) -> DPO:
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError(f"label_smoothing has no effect with loss {self.variant}; it is of sigmoid")
        return self

    @property
    def compares(self) -> Comparison:
        """Pairs; of sigmoid rankings as well, of kto single answers that were judged."""
        return "rankings" if self.variant == "sigmoid" else "judged" if self.variant == "kto" else "pairs"

    @property
    def needs_reference(self) -> bool:
        """All but orpo do."""
        return self.variant != "orpo"

    def check(self, config: dict[str, Any]) -> None:
        """Refuses models that do not write from left to right. Raises ConfigError."""
        from tunesmith.models.families import family_of

        family = family_of(config)
        if family.kind != "decoder":
            told = f"dpo compares what a decoder would write, and {family.name} is none"
            raise ConfigError(told, where="objective", hint="take a decoder such as smollm2-135m")

    def weight(self, batch: Batch) -> float:
        """Rows of the batch; of kto its answers."""
        ranks = ranks_of(batch)
        return len(ranks) if self.variant == "kto" else batch.row_count

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum over units of the loss above."""
        from tunesmith.core.types import Mean

        return Mean(self.losses(*self.chances(policy, batch), batch).sum(), self.weight(batch))

    def chances(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        """log p of each answer and log p / p_reference, both [documents]; the second is 0 where none is needed."""
        # before the policy, whose activations are then not yet held
        reference = policy.reference_losses(batch) if self.needs_reference else None
        losses = policy.token_losses(batch)
        ratios = losses.new_zeros(()).expand_as(losses) if reference is None else reference - losses
        return _summed(-losses, batch), _summed(ratios, batch)

    def rewards(self, chances: Tensor, ratios: Tensor, batch: Batch) -> Tensor:
        """What the policy implies that each answer is worth, [documents]; of orpo its mean log p of a token."""
        return self.beta * ratios if self.needs_reference else chances / _counts(batch).to(chances.device)

    def losses(self, chances: Tensor, ratios: Tensor, batch: Batch) -> Tensor:
        """The loss of each unit from what `chances` gives: [rows], of kto [documents]."""
        from torch.nn.functional import logsigmoid

        ranks = ranks_of(batch).to(ratios.device)
        if self.variant == "sigmoid":
            return ranking_losses(self.beta * ratios, batch, label_smoothing=self.label_smoothing)
        signs = 1 - 2 * ranks  # 1 of the chosen, -1 of the rejected
        if self.variant == "kto":
            return (-self.beta * signs * ratios).sigmoid()
        rows, counts = rows_of(batch, ratios), _counts(batch).to(ratios.device)
        if self.variant == "ipo":
            return (per_row(signs * ratios / counts, rows, batch) - 0.5 / self.beta).square()
        likely = chances / counts
        certain = likely.clamp(max=-1e-6)  # what is certain has no finite odds
        odds = certain - (-certain.expm1()).log()
        learnt = per_row(-likely * (ranks == 0), rows, batch)
        return learnt - self.beta * logsigmoid(per_row(signs * odds, rows, batch))


def _summed(values: Tensor, batch: Batch) -> Tensor:
    """Sums [documents] of values [supervised]."""
    return values.new_zeros(len(batch.lengths)).index_add(0, _owners(batch), values)


def _owners(batch: Batch) -> Tensor:
    """int64 [supervised]: the document of each supervised token."""
    import torch

    ends = torch.tensor(batch.lengths, device=batch.sources.device).cumsum(0)
    return torch.searchsorted(ends, batch.sources, right=True)


def _counts(batch: Batch) -> Tensor:
    """int64 [documents]: supervised tokens."""
    import torch

    return torch.zeros(len(batch.lengths), dtype=torch.int64, device=batch.sources.device).index_add(
        0, _owners(batch), torch.ones_like(batch.sources)
    )
