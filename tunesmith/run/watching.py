"""Who watches a run that learns from its own completions: some of them on disk, and warnings as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.evaluate.signs import signs
from tunesmith.train.log import MetricsLog

if TYPE_CHECKING:
    from tunesmith.run.kept_rollouts import Rollout

log = logging.getLogger(__name__)


class Shown:
    """Writes some completions of every rollout to a file, one a line; an observer of the trainer.

    Args:
        taken: the completions that have come since it was asked last.
    """

    def __init__(self, path: Path, taken: Callable[[], Sequence[Rollout]]) -> None:
        self.path, self.taken = path, taken
        self.lines: MetricsLog | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if self.lines is None:
            self.lines = MetricsLog(self.path, step - 1)  # a process before may have come further
        for one in self.taken():
            told = {"prompt": one.question, "completion": one.text, "reward": one.reward, "stopped": one.stopped}
            self.lines.write({"step": step, **told})

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()


class Signs:
    """Warns of each sign of trouble once; an observer of the trainer."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.told: set[str] = set()

    def __call__(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        for name, text in signs(self.records).items():
            if name not in self.told:
                self.told.add(name)
                log.warning("step %d: %s", record["step"], text)

    def close(self) -> None:
        """There is nothing to close."""
