"""AdamW whose moments are kept in bf16 or in 8-bit codes; the arithmetic of an update is fp32, one tensor at a time.

A second moment changes by a thousandth an update, less than half a step of either format: rounded to nearest it would
stand still. So what is kept is rounded up or down by chance, in proportion (Gupta et al. 2015, arXiv 1502.02551), a
function of (seed, update, tensor, place): a resumed run draws the same, and so does any layout. 8-bit codes are the
dynamic ones in blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861). Differs there: the root of the second moment is
kept, whose range is half as many digits, so that none that matters becomes zero and is divided by.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.core.moments import BLOCK, kept_in
from tunesmith.kernels.codes import from_dynamic, to_dynamic
from tunesmith.parallel.layout import Single
from tunesmith.train.optim import BETAS, EPS, FIRST, SCALES, SECOND, check_masters
from tunesmith.train.spots import spots

if TYPE_CHECKING:
    from tunesmith.parallel.layout import Layout


class CompactAdamW:
    """As `optim.AdamW`.

    Args:
        state: bf16 or int8.
        seed: of rounding.
        layout: whose pieces the masters are; None is one process.
    """

    def __init__(
        self,
        masters: Mapping[str, nn.Parameter],
        state: str,
        *,
        weight_decay: float = 0.0,
        lr_factors: Mapping[str, float] = MappingProxyType({}),
        matrices: Collection[str] | None = None,
        seed: int = 0,
        layout: Layout | None = None,
    ) -> None:
        check_masters(masters)
        self.masters, self.kept, self.seed = dict(masters), state, seed
        self.weight_decay, self.lr_factors = weight_decay, lr_factors
        # named once, as a layout may hand in parts, which are flat
        self.matrices = {name for name, held in masters.items() if held.ndim >= 2} if matrices is None else matrices
        self.layout = layout or Single()
        self.spots = spots(self.layout, self.masters)
        self.updates = 0
        self.held: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients that the masters hold, at this rate times what each has as its factor."""
        if not self.updates:
            self.held = self.fresh()
        self.updates += 1
        agreed = self._agreed()
        first_left, second_left = (1 - beta**self.updates for beta in BETAS)
        for name, master in self.masters.items():
            if master.grad is None:
                continue
            rate = lr * self.lr_factors.get(name, 1.0)
            first, second = (moment.view_as(master) for moment in self._moved(name, master.grad))
            wide = master.float()
            wide.mul_(1 - rate * (self.weight_decay if name in self.matrices else 0.0))
            wide.addcdiv_(first, (second / second_left).sqrt_().add_(EPS), value=-rate / first_left)
            master.copy_(wide)
            self._keep(FIRST, name, first, agreed)
            self._keep(SECOND, name, second, agreed)

    def state(self) -> dict[str, Tensor]:
        """Both moments of every tensor as they are kept, by name. Empty before the first step."""
        return dict(self.held)

    def fresh(self) -> dict[str, Tensor]:
        """Moments of zero, as `state` names them."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            kept = kept_in(self.spots[name].numbers, self.kept)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[kept]
            for kind in (FIRST, SECOND):
                if kept == "int8":
                    lead = self.spots[name].lead
                    codes, scales = to_dynamic(torch.zeros_like(master), signed=kind == FIRST, block=BLOCK, lead=lead)
                    found |= {kind + name: codes.view(master.shape), SCALES + kind + name: scales}
                else:
                    found[kind + name] = torch.zeros_like(master, dtype=dtype)
        return found

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Continues after so many updates whose moments these are, named as `state` names them."""
        self.held, self.updates = dict(moments), steps

    def _moved(self, name: str, gradient: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Both moments of some numbers of a piece after this update, float32 in one row."""
        arrived = gradient.reshape(-1)[part].float()
        first = self._read(FIRST + name, part).lerp_(arrived, 1 - BETAS[0])
        return first, self._read(SECOND + name, part).mul_(BETAS[1]).addcmul_(arrived, arrived, value=1 - BETAS[1])

    def _read(self, name: str, part: slice = slice(None)) -> Tensor:
        held = self.held[name].view(-1)[part]
        if SCALES + name not in self.held:
            return held.float() if held.dtype != torch.float32 else held
        spot, is_first = self.spots[name.partition("/")[2]], name.startswith(FIRST)
        lead = spot.lead + (part.start or 0)
        found = from_dynamic(held, self.held[SCALES + name], signed=is_first, block=BLOCK, lead=lead)
        return found if is_first else found.square_()

    def _agreed(self) -> dict[tuple[str, int], float]:
        """The largest magnitudes of blocks that several processes have numbers of, by moment and number of block."""
        found: dict[tuple[str, int], Tensor] = {}
        for name, master in self.masters.items():
            if SCALES + FIRST + name not in self.held:
                continue
            spot = self.spots[name]
            for block in spot.shared:
                part, first, second = spot.within(block), *torch.zeros(2, 1, device=master.device)
                if master.grad is not None and part.stop > part.start:
                    first, second = self._moved(name, master.grad, part)
                found[FIRST + name, block], found[SECOND + name, block] = first.abs().max(), second.max().sqrt()
        if not found:
            return {}
        return dict(zip(found, self.layout.data.largest(torch.stack([*found.values()]).tolist()), strict=True))

    def _keep(self, kind: str, name: str, moment: Tensor, agreed: Mapping[tuple[str, int], float]) -> None:
        spot, held = self.spots[name], self.held[kind + name]
        if held.dtype == torch.float32:
            return
        chance = spot.chance(self.seed, "moments", self.updates, kind + name).view(held.shape).to(held.device)
        if held.dtype == torch.bfloat16:
            held.copy_(scattered(moment, chance))
            return
        moment = moment.sqrt_() if kind == SECOND else moment
        here = [block for block in spot.shared if spot.within(block).stop > spot.within(block).start]
        largest = {spot.place(block): agreed[kind + name, block] for block in here}
        codes, scales = to_dynamic(
            moment, signed=kind == FIRST, block=BLOCK, chance=chance, lead=spot.lead, largest=largest
        )
        self.held |= {kind + name: codes.view(held.shape), SCALES + kind + name: scales}


def scattered(x: Tensor, chance: Tensor) -> Tensor:
    """float32 numbers on bf16's grid, rounded up or down by chance in proportion to how near these are.

    Args:
        chance: float32 in [0, 1), of the shape of x.
    """
    bits = x.contiguous().view(torch.int32)
    return ((bits + (chance * (1 << 16)).int()) & -(1 << 16)).view(torch.float32)
