"""The learning rate as a pure function of the step, so that a resumed run needs to remember nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.train.section import TrainSection


def learning_rate(settings: TrainSection, step: int, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 1 to `total_steps`.

    With w = round(warmup * total_steps): update n of the warm-up has n / w of `lr`. Then the fraction
    f = (n - 1 - w) / (total_steps - w) of the way down is behind: linear has 1 - f, cosine (1 + cos(pi f)) / 2.
    The first update after the warm-up has all of `lr`, and the lowest rate, 0, comes one update after the
    last, so that no update is wasted on a rate of 0. Steps beyond the last keep the last one's rate.
    """
    warm = round(settings.warmup * total_steps)
    step = min(step, total_steps)
    if step <= warm:
        return settings.lr * step / warm
    fraction = (step - 1 - warm) / (total_steps - warm)
    if settings.schedule == "linear":
        return settings.lr * (1.0 - fraction)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * fraction))
    return settings.lr
