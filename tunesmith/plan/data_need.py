"""How much data there is for a model of this size, and what it comes to: tokens a parameter, epochs, padding.

The one idea: published rules, each with its source, beside the counts of the run. They are of training from scratch
and of repeated data; a run that adapts a model is told where it stands, not what to do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.core.amounts import in_count

TOKENS_A_PARAMETER = 20  # for the least loss at a budget of work (Hoffmann et al. 2022, arXiv 2203.15556, table 3)
GOOD_EPOCHS = 4  # up to which repeated text is nearly as good as new (Muennighoff et al. 2023, arXiv 2305.16264)
FEW_ROWS = 1000  # LIMA (Zhou et al. 2023, arXiv 2305.11206) was taught by so many, chosen by hand
PETAFLOPS_DAY = 1e15 * 86_400


@dataclass(frozen=True)
class Need:
    """The data of a run.

    Attributes:
        parameters: of the model.
        tokens: read by the whole run; `set_tokens` of them different, in `rows` rows.
        supervised_share: of the tokens, those that are learnt.
        padding_share: of the places in padded micro-batches, those without a token: what packing saves.
        lengths: rows by length, as `DataStatistics` counts them.
        flops: of the run.
    """

    parameters: int
    tokens: int
    set_tokens: int
    rows: int
    supervised_share: float
    padding_share: float
    lengths: dict[str, int]
    flops: int

    @property
    def optimal_tokens(self) -> int:
        """For a model of this size that is trained from scratch."""
        return TOKENS_A_PARAMETER * self.parameters

    @property
    def epochs(self) -> float:
        return self.tokens / max(1, self.set_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, and the warnings."""
        return {
            **asdict(self),
            "tokens_a_parameter": self.tokens / max(1, self.parameters),
            "optimal_tokens": self.optimal_tokens,
            "epochs": self.epochs,
            "petaflops_days": self.flops / PETAFLOPS_DAY,
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """What is unusual."""
        found = []
        if self.epochs > GOOD_EPOCHS:
            found.append(
                f"every row is read {self.epochs:.3g} times: from {GOOD_EPOCHS} on, reading again teaches ever less "
                "(Muennighoff et al. 2023), and a small set is learnt by heart; judge on rows that are not in it"
            )
        if self.rows < FEW_ROWS and self.epochs > 1:
            found.append(f"{self.rows} rows are few: what the model learns depends on each of them")
        return found


def show_need(need: dict[str, Any]) -> list[str]:
    """Lines for people, of `Need.as_dict()`."""
    rate, optimal = need["tokens_a_parameter"], need["optimal_tokens"]
    side = "under" if need["tokens"] < optimal else "over"
    lines = [
        f"data: {need['rows']:,} rows, {need['set_tokens']:,} tokens, {100 * need['supervised_share']:.0f} % of them "
        f"learnt, {need['epochs']:.3g} epochs; packing saves {100 * need['padding_share']:.0f} % padding",
        f"amount: {rate:.2g} tokens a parameter, {side} the {TOKENS_A_PARAMETER} that are best from scratch "
        f"({in_count(optimal)} for this size; Hoffmann et al. 2022)",
        f"work: {need['petaflops_days']:.2g} petaflop/s-days",
    ]
    return lines + [f"warning: {told}" for told in need["warnings"]]
