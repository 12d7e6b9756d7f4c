"""What a reward is: a section of the configuration that says what a completion earns.

The one idea: it sees the prompt, the completion and the whole row, and nothing of the model. One reward a file; the
table is in `__init__.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tunesmith.core.section import Section

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class Reward(Section):
    """A way to judge a completion.

    Attributes:
        kind: name in the table.
        weight: what it counts beside others; they add up.
    """

    kind: str
    weight: float = Field(default=1.0, ge=-1e6, le=1e6)

    @property
    def files(self) -> tuple[str, ...]:
        """What it depends on beside its settings."""
        return ()

    def check(self) -> None:
        """Finds settings that cannot work, without a model. Raises ConfigError."""

    def check_there(self) -> None:
        """Finds that what earlier runs leave behind is not there. Raises ConfigError."""

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """What a completion earns, before it is weighted. Raises DataError for a row that it cannot judge."""
        raise NotImplementedError
