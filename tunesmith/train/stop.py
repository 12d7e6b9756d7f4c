"""Why a run ends before its last step: a metric that no longer improves, or a signal.

Budgets of time and tokens are one comparison each and live in the trainer.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from tunesmith.core.errors import ConfigError, Stopped, did_you_mean
from tunesmith.core.signals import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    from tunesmith.train.checkpoint import State
    from tunesmith.train.section import StopSection

log = logging.getLogger(__name__)

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def judge(stop: StopSection, metrics: dict[str, float], state: State) -> bool:
    """Enters an evaluation into the state; True when it is the best so far.

    NaN is never best: it counts as an evaluation without improvement. Raises ConfigError when the metric was
    not computed.
    """
    if stop.metric not in metrics:
        known = " ".join(metrics)
        hint = did_you_mean(stop.metric, metrics)
        raise ConfigError(f"{stop.metric!r} was not evaluated; there are {known}", where="train.stop.metric", hint=hint)
    value = metrics[stop.metric]
    sign = -1.0 if stop.metric in LOWER_IS_BETTER else 1.0
    best = math.isfinite(value) and (state.best_value is None or sign * value > sign * state.best_value)
    if best:
        state.best_value, state.best_step, state.bad_evaluations = value, state.step, 0
    else:
        state.bad_evaluations += 1
    return best


class Cut(BaseException):
    """A signal during work that can be left at any point; never reaches the caller of the trainer."""


class Signals:
    """Turns SIGTERM and SIGINT into a request that the loop answers between two steps.

    A second interrupt stops at once, without saving; a third one ends the process as if nothing were here.
    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        exit_code: 0 while nobody asked, else what the process should exit with.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._interrupts = 0
        self._may_cut = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def cuttable(self) -> Iterator[None]:
        """A block that a request leaves at once, by raising Cut."""
        self._may_cut = True
        try:
            if self.exit_code:
                raise Cut
            yield
        finally:
            self._may_cut = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
        if self._interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise Stopped("interrupted twice; nothing more was saved", exit_code=INTERRUPTED)
        if not self.exit_code:
            self.exit_code = TERMINATED if number == signal.SIGTERM else INTERRUPTED
            _tell("finishing this step and saving (interrupt again to stop at once)\n")
        if self._may_cut:
            self._may_cut = False
            raise Cut

    def stopped(self, step: int) -> Stopped:
        """What the loop raises once it has saved."""
        name = "terminated" if self.exit_code == TERMINATED else "interrupted"
        return Stopped(f"{name}; step {step} is saved", hint="--resume continues it", exit_code=self.exit_code)


def _tell(text: str) -> None:
    # straight to the descriptor: the interrupted code may be inside a buffered write of its own
    with suppress(OSError):
        os.write(2, text.encode())
