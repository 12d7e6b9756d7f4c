"""Loss scaling: a factor on the loss that lifts gradients into what fp16 can hold, and finds its own size.

Micikevicius et al. 2018, arXiv 1710.03740, section 3.2; dynamic as its last paragraph says: halved where a gradient
overflows, and that step left out; doubled after many steps without. Factors are powers of two, so that scaling and
unscaling round nothing. What a step does with it stands in `step.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

START, LEAST = 2.0**16, 1.0
GROW_AFTER = 2000  # steps in a row without overflow


@dataclass
class LossScale:
    """The factor and what it depends on; a checkpoint holds all three.

    Attributes:
        scale: what the loss is multiplied by.
        good_steps: in a row since it last changed.
        skipped_steps: left out in the whole run.
    """

    scale: float = START
    good_steps: int = 0
    skipped_steps: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether a smaller factor is left to try; if not, it is not the factor that makes gradients overflow."""
        return self.scale > LEAST

    def record(self) -> dict[str, float]:
        """What the record of a step says of it."""
        return {"loss_scale": self.scale, "skipped_steps": self.skipped_steps}

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides gradients, float32, by the factor, in place."""
        torch._foreach_mul_(list(gradients), 1 / self.scale)

    def adjust(self, overflowed: bool) -> None:
        """Counts a step that had a gradient which is infinite or NaN, and was left out, or one that had none."""
        if overflowed:
            self.scale, self.good_steps, self.skipped_steps = self.scale / 2, 0, self.skipped_steps + 1
            return
        self.good_steps += 1
        if self.good_steps == GROW_AFTER:
            self.scale, self.good_steps = self.scale * 2, 0
