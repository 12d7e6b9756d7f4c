"""Every error a user can cause: where it is, what is wrong, what would be right, one hint.

Each kind carries the exit code of the program and is also the standard exception that fits, so that ordinary
`except ValueError` works. The command line prints them; nothing here knows about terminals.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunesmithError(Exception):
    """A problem the user can mend.

    Attributes:
        message: what is wrong, with the value, and what is allowed.
        where: file, row or key, as in `data.train: rows.jsonl:17`.
        hint: one action that mends it; may be empty.
        exit_code: what the process exits with.
        is_told: another process of the run says it.
    """

    exit_code = 1
    is_told = False

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line}\nhint: {self.hint}" if self.hint else line

    def __reduce__(self) -> tuple[object, ...]:
        # exceptions with keyword-only fields do not survive pickling by default, and workers raise these
        return (_rebuild, (type(self), self.message, self.where, self.hint))


def _rebuild(kind: type[TunesmithError], message: str, where: str, hint: str) -> TunesmithError:
    return kind(message, where=where, hint=hint)


class ConfigError(TunesmithError, ValueError):
    """The configuration or the command line asks for something that does not exist or cannot be combined."""

    exit_code = 2


class DataError(TunesmithError, ValueError):
    """A data file or a row of it is not what its format says."""

    exit_code = 3


class ModelError(TunesmithError, RuntimeError):
    """A model folder, tokenizer or weights file is missing, damaged or does not fit."""

    exit_code = 4


class AdapterError(ModelError, ValueError):
    """An adapter does not fit the model it is put on, or its files disagree with each other."""


class CheckpointError(ModelError):
    """A run cannot be resumed from what its folder holds."""


class ResourceError(TunesmithError, OSError):
    """Disk, memory, permission or another thing of the machine is missing."""

    exit_code = 5


class DivergedError(TunesmithError, ArithmeticError):
    """Training produced NaN or infinity."""

    exit_code = 6


class BusyError(TunesmithError, RuntimeError):
    """Another process is using the run folder."""

    exit_code = 7


class PeerError(TunesmithError, RuntimeError):
    """Another process of the same run failed."""

    exit_code = 8
    HINT = "what is saved can be resumed with --resume, with any number of processes"

    @staticmethod
    def told(reason: str) -> str:
        """The message for what is known of the failure, as in `rank 1: ...`."""
        return f"another process of this run failed: {reason}"


class Stopped(TunesmithError):
    """The run was asked to stop and has saved: 75 after SIGTERM, 130 after an interrupt."""

    def __init__(self, message: str, *, where: str = "", hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, where=where, hint=hint)
        self.exit_code = exit_code


class Problems:
    """Collects errors so that they are shown together.

    `add` never raises; `raise_if_any` raises one error of the first problem's kind that lists up to `limit`.
    """

    def __init__(self) -> None:
        self.errors: list[TunesmithError] = []
        self.count = 0

    def add(self, error: TunesmithError, keep: int = 20) -> None:
        self.count += 1
        if len(self.errors) < keep:
            self.errors.append(error)

    def raise_if_any(self, limit: int = 20) -> None:
        if not self.errors:
            return
        first = self.errors[0]
        if self.count == 1:
            raise first
        lines = [str(error) for error in self.errors[:limit]]
        if self.count > len(lines):
            lines.append(f"... and {self.count - len(lines)} more")
        raise type(first)("\n".join(lines))


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.55)
    return found[0] if found else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A hint that names the nearest choice, or an empty string."""
    found = nearest(name, choices)
    return f"did you mean {found}?" if found else ""
