"""AdamW whose moments, and the masters it updates, are kept apart from what the model computes with.

The one idea: an update is elementwise, so that it can be made of parts that are small enough to be resident one at a
time, with the same bits. Beside a model on the CPU its state lies in mapped files (`scratch.py`); beside one on an
accelerator in host memory, where the update is computed, too (ZeRO-Offload: Ren et al. 2021, arXiv 2101.06840).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tunesmith.train.optim import BETAS, EPS, FIRST, SECOND, check_masters
from tunesmith.train.scratch import let_go, mapped

PART = 1 << 20  # numbers of one part: whole pages, and whole vectors of every processor

Room = Callable[[Mapping[str, Sequence[int]]], dict[str, Tensor]]


def room_for(device: torch.device, folder: Path) -> Room:
    """What gives zeros for masters and moments, float32, by name, apart from a model on a device."""

    def host(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        return {name: torch.zeros(tuple(shape), pin_memory=True) for name, shape in shapes.items()}

    return host if device.type != "cpu" else lambda shapes: mapped(folder, shapes)


class ApartAdamW:
    """As `optim.AdamW`, bit for bit.

    Args:
        room: as `room_for` gives it; moments are made there.
    """

    def __init__(
        self,
        masters: Mapping[str, nn.Parameter],
        room: Room,
        *,
        weight_decay: float = 0.0,
        lr_factors: Mapping[str, float] = MappingProxyType({}),
        matrices: Collection[str] | None = None,
    ) -> None:
        check_masters(masters)
        self.masters, self.room = dict(masters), room
        decayed = {name for name, held in masters.items() if held.ndim >= 2} if matrices is None else matrices
        self.decay = {name: weight_decay if name in decayed else 0.0 for name in masters}
        self.factors = {name: lr_factors.get(name, 1.0) for name in masters}
        self.updates = 0
        self.held: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients that the masters hold, at this rate times what each has as its factor."""
        if not self.updates:
            self.held = self.fresh()
        for name, master in self.masters.items():
            if master.grad is None:
                continue
            whole = (master, master.grad, self.held[FIRST + name], self.held[SECOND + name])
            for parts in zip(*(held.view(-1).split(PART) for held in whole), strict=True):
                self._update(*parts, lr=lr * self.factors[name], decay=self.decay[name])
        self.updates += 1

    def _update(self, *parts: Tensor, lr: float, decay: float) -> None:
        # copies only where the master is on an accelerator and its moments are not
        master, gradient, first, second = (part.to(parts[-1].device) for part in parts)
        adamw(
            [master], [gradient], [first], [second], [], [torch.tensor(float(self.updates))], fused=True,
            amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=decay, eps=EPS, maximize=False,
        )  # fmt: skip
        parts[0].copy_(master)
        for part in parts:
            let_go(part)

    def state(self) -> dict[str, Tensor]:
        """Both moments of every tensor, by `first/NAME` and `second/NAME`. Empty before the first step."""
        return dict(self.held)

    def fresh(self) -> dict[str, Tensor]:
        """Moments of zero, as `state` names them."""
        return self.room({kind + name: held.shape for kind in (FIRST, SECOND) for name, held in self.masters.items()})

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Continues after so many updates whose moments these are, named as `state` names them."""
        self.held, self.updates = dict(moments), steps
