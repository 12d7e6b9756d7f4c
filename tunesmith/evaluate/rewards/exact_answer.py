"""Exact answers: the completion, or what follows a marker in it, is an answer of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.evaluate.rewards.reward import Reward

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class ExactAnswer(Reward):
    """1 for an answer of the data, else 0; case and white space aside.

    Attributes:
        after: only what follows the last of these counts, in both, as in `#### 42`; a completion without it earns 0.
    """

    kind: Literal["exact_answer"] = "exact_answer"
    after: str = ""

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """1 or 0. An empty answer earns nothing."""
        if self.after and self.after not in completion:
            return 0.0
        said = self._plain(completion)
        return float(bool(said) and any(said == self._plain(answer) for answer in prompt.dialogue.answers))

    def _plain(self, text: str) -> str:
        return " ".join((text.rpartition(self.after)[2] if self.after else text).split()).casefold()
