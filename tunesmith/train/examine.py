"""Evaluations between two steps: when they are due, which process makes them, and that they leave no trace.

The first process of several evaluates alone and tells the others. Where a model is in parts, all do so together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import DivergedError
from tunesmith.train.stop import Cut, Signals

if TYPE_CHECKING:
    from tunesmith.parallel.layout import Layout


class Examiner:
    """Calls the evaluation of a run.

    Args:
        evaluate: metrics of the current weights after a step; None for a run without evaluations.
        every: steps between two of them.
        devices: accelerators whose random state an evaluation must not move.
    """

    def __init__(
        self, evaluate: Callable[[int], dict[str, float]] | None, every: int, layout: Layout, devices: Sequence[Any]
    ) -> None:
        self.evaluate, self.every, self.layout, self.devices = evaluate, every, layout, devices

    def is_due(self, step: int, is_over: bool) -> bool:
        """Whether there is one after a step; the last step has one whatever its number."""
        return self.evaluate is not None and self.every > 0 and (step % self.every == 0 or is_over)

    def metrics(self, step: int, signals: Signals) -> dict[str, float] | None:
        """What is found; None where a signal has cut it off. Raises DivergedError where its loss is not finite."""
        if self.layout.in_parts:  # the others wait for this process within it: it cannot be cut
            return self._measured(step)
        return self.layout.world.first(lambda: self._unless_cut(step, signals))

    def _unless_cut(self, step: int, signals: Signals) -> dict[str, float] | None:
        try:
            with signals.cuttable():
                return self._measured(step)
        except Cut:
            return None

    def _measured(self, step: int) -> dict[str, float]:
        assert self.evaluate is not None
        with torch.random.fork_rng(devices=self.devices):
            metrics = {name: float(value) for name, value in self.evaluate(step).items()}
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise DivergedError("the evaluation's loss is not a finite number")
        return metrics
