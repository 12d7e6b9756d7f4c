"""Literal tables of things that are loaded when used, so that listing them costs nothing.

A table maps a name to `module:attribute` and one line of description; adding an entry is one line.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Registry:
    """Named things of one sort.

    Attributes:
        sort: what they are, for messages ("method", "objective", "metric").
        table: name to (`module:attribute`, one line that says what it is).
    """

    sort: str
    table: dict[str, tuple[str, str]]

    def names(self) -> list[str]:
        return list(self.table)

    def summary(self, name: str) -> str:
        """The line that describes an entry."""
        return self.table[name][1]

    def load(self, name: str, where: str = "") -> Any:
        """The thing itself. Raises ConfigError naming the nearest entry."""
        if name not in self.table:
            known = " ".join(self.table)
            raise ConfigError(
                f"{name!r} is no {self.sort}; there are {known}",
                where=where,
                hint=did_you_mean(name, self.table),
            )
        module, _, attribute = self.table[name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)
