"""A function of the user's own as a reward: (prompt, completion, row) -> a number.

The one idea: what it raises, and what it gives that is no number, is told with its file and its name.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.evaluate.rewards.reward import Reward

if TYPE_CHECKING:
    from tunesmith.data.encode import Prompt


class Python(Reward):
    """What a function says.

    Attributes:
        function: `file.py:function`. It is called with the last thing said to the model, the completion, and the row
            as its file holds it, and gives a finite number.
    """

    kind: Literal["python"] = "python"
    function: str = Field(min_length=1)
    _loaded: Callable[..., Any] | None = PrivateAttr(default=None)

    @property
    def files(self) -> tuple[str, ...]:
        """The file of the function."""
        return (self.function.rpartition(":")[0],)

    def check(self) -> None:
        """The file can be read and defines the function; nothing of it runs."""
        path, _, name = self.function.rpartition(":")
        try:
            tree = ast.parse(Path(path).read_text("utf-8"), path)
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{path!r} cannot be read: {error}", where="objective.reward") from error
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if name not in names:
            told = f"{path} has no function {name!r}; there are {' '.join(names) or 'none'}"
            raise ConfigError(told, where="objective.reward")

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """What the function gives. Raises DataError naming it, and the row."""
        where = f"objective.reward: {self.function}"
        try:
            if self._loaded is None:
                path, _, name = self.function.rpartition(":")
                self._loaded = run_path(path)[name]
            found = self._loaded(prompt.question, completion, prompt.data)
        except Exception as error:
            told = f"{type(error).__name__}: {error} ({prompt.dialogue.where}, completion {completion[:80]!r})"
            raise DataError(told, where=where) from error
        if isinstance(found, bool | int | float) and math.isfinite(found):
            return float(found)
        raise DataError(f"gave {found!r} for {prompt.dialogue.where}; a finite number is needed", where=where)
