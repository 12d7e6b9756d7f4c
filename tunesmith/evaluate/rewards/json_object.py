"""JSON: the completion is an object, and has the keys that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.core.section import Names
from tunesmith.evaluate.metrics.match import parse_json
from tunesmith.evaluate.rewards.reward import Reward

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class JsonObject(Reward):
    """1 for a JSON object with some keys, else 0.

    Attributes:
        keys: that it has to have.
    """

    kind: Literal["json"] = "json"
    keys: Names = ()

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """1 or 0."""
        found = parse_json(completion)
        return float(isinstance(found, dict) and set(self.keys) <= set(found))
