"""Function calls: the completion is JSON and names the function and the arguments that the data has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tunesmith.core.errors import DataError
from tunesmith.evaluate.metrics.match import canonical, parse_json
from tunesmith.evaluate.rewards.reward import Reward

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class FunctionCall(Reward):
    """1 for the expected call, else 0.

    Attributes:
        named: what a call with the right name and other arguments earns, between 0 and 1.
    """

    kind: Literal["function_call"] = "function_call"
    named: float = 0.0

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """What the call earns. Raises DataError where the data's own answer is none."""
        wanted = [call for call in map(_call, prompt.dialogue.answers) if call]
        if not wanted:
            told = "the answer of this row is no function call ({name, arguments} as JSON)"
            raise DataError(told, where=prompt.dialogue.where, hint="keep rows that end with a call")
        said = _call(completion)
        if said is None:
            return 0.0
        if any(canonical(said) == canonical(one) for one in wanted):
            return 1.0
        return self.named if any(said["name"] == one["name"] for one in wanted) else 0.0


def _call(text: str) -> dict[str, Any] | None:
    """A call, or None."""
    found = parse_json(text)
    if isinstance(found, dict) and set(found) == {"name", "arguments"} and isinstance(found["name"], str):
        return found
    return None
