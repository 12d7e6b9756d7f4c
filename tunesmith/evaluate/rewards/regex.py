"""Patterns: the completion holds something that a regular expression describes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.core.errors import ConfigError
from tunesmith.evaluate.rewards.reward import Reward

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class Regex(Reward):
    """1 where the pattern is found anywhere in the completion, else 0.

    Attributes:
        pattern: of Python's `re`; `^...$` with the flag `(?s)` is all of the completion.
    """

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1)

    def check(self) -> None:
        """The pattern is one."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"{self.pattern!r} is no regular expression: {error}", where="objective.reward"
            ) from error

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """1 or 0."""
        return float(re.search(self.pattern, completion) is not None)
