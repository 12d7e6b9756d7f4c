"""Who watches a run that learns from its own completions: some of them on disk, and warnings as they come."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.evaluate.signs import signs
from tunesmith.train.log import MetricsLog

if TYPE_CHECKING:
    from tunesmith.run.rollouts import Rollouts

log = logging.getLogger(__name__)
FILE = "rollouts.jsonl"


class Shown:
    """Writes some completions of every rollout to `rollouts.jsonl`, one a line; an observer of the trainer."""

    def __init__(self, folder: Path, rollouts: Rollouts) -> None:
        self.path, self.rollouts = folder / FILE, rollouts
        self.lines: MetricsLog | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        step, shown = record["step"], self.rollouts.shown
        if self.lines is None:
            self.lines = MetricsLog(self.path, step - 1)  # a process before may have come further
        for one in shown:
            told = {"prompt": one.question, "completion": one.text, "reward": one.reward, "stopped": one.stopped}
            self.lines.write({"step": step, **told})
        self.rollouts.shown = []

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
