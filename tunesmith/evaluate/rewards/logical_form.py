"""SQL that asks the same as the data's: column, aggregation and set of conditions, as the metric of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.evaluate.metrics.wikisql import parse_query
from tunesmith.evaluate.rewards.reward import Reward

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class LogicalForm(Reward):
    """1 for a query that is the data's, else 0.

    Attributes:
        parsed: what another query earns that can be read, between 0 and 1.
    """

    kind: Literal["logical_form"] = "logical_form"
    parsed: float = 0.0

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """What the query earns."""
        said = parse_query(completion)
        if said is None:
            return 0.0
        return 1.0 if said in map(parse_query, prompt.dialogue.answers) else self.parsed
