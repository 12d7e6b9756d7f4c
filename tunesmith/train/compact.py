"""AdamW whose moments are kept in bf16 or in 8-bit codes; the arithmetic of an update is fp32, one tensor at a time.

A second moment changes by a thousandth an update, less than half a step of either format: rounded to nearest it would
stand still. So what is kept is rounded up or down by chance, in proportion (Gupta et al. 2015, arXiv 1502.02551), from
a stream of (seed, update): a resumed run draws the same. 8-bit codes are the dynamic ones in blocks of 256 (Dettmers
et al. 2021, arXiv 2110.02861). Differs there: the root of the second moment is kept, whose range is half as many
digits, so that none that matters becomes zero and is divided by.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tunesmith.core.moments import BLOCK, kept_in
from tunesmith.core.rng import torch_generator
from tunesmith.kernels.codes import from_dynamic, to_dynamic
from tunesmith.train.optim import BETAS, EPS, FIRST, SCALES, SECOND, check_masters


class CompactAdamW:
    """As `optim.AdamW`.

    Args:
        state: bf16 or int8.
        seed: of rounding.
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
    ) -> None:
        check_masters(masters)
        self.masters, self.kept, self.seed = dict(masters), state, seed
        self.weight_decay, self.lr_factors = weight_decay, lr_factors
        # named once, as a layout may hand in parts, which are flat
        self.matrices = {name for name, held in masters.items() if held.ndim >= 2} if matrices is None else matrices
        self.updates = 0
        self.held: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients that the masters hold, at this rate times what each has as its factor."""
        if not self.updates:
            self.held = self.fresh()
        self.updates += 1
        draw = torch_generator(self.seed, "moments", self.updates)
        first_left, second_left = (1 - beta**self.updates for beta in BETAS)
        for name, master in self.masters.items():
            if master.grad is None:
                continue
            gradient, rate = master.grad.float(), lr * self.lr_factors.get(name, 1.0)
            first = self._read(FIRST + name, master).lerp_(gradient, 1 - BETAS[0])
            second = self._read(SECOND + name, master).mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            wide = master.float()
            wide.mul_(1 - rate * (self.weight_decay if name in self.matrices else 0.0))
            wide.addcdiv_(first, (second / second_left).sqrt_().add_(EPS), value=-rate / first_left)
            master.copy_(wide)
            self._keep(FIRST + name, first, draw)
            self._keep(SECOND + name, second, draw)

    def state(self) -> dict[str, Tensor]:
        """Both moments of every tensor as they are kept, by name. Empty before the first step."""
        return dict(self.held)

    def fresh(self) -> dict[str, Tensor]:
        """Moments of zero, as `state` names them."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            kept = kept_in(master.numel(), self.kept)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[kept]
            for kind in (FIRST, SECOND):
                if kept == "int8":
                    codes, scales = to_dynamic(torch.zeros_like(master), signed=kind == FIRST, block=BLOCK)
                    found |= {kind + name: codes, SCALES + kind + name: scales}
                else:
                    found[kind + name] = torch.zeros_like(master, dtype=dtype)
        return found

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Continues after so many updates whose moments these are, named as `state` names them."""
        self.held, self.updates = dict(moments), steps

    def _read(self, name: str, like: Tensor) -> Tensor:
        held = self.held[name]
        if SCALES + name not in self.held:
            return held.float() if held.dtype != torch.float32 else held
        found = from_dynamic(held, self.held[SCALES + name], signed=name.startswith(FIRST), block=BLOCK).view_as(like)
        return found.square_() if name.startswith(SECOND) else found

    def _keep(self, name: str, moment: Tensor, draw: torch.Generator) -> None:
        held = self.held[name]
        if SCALES + name in self.held:
            if name.startswith(SECOND):
                moment = moment.sqrt_()
            chance = torch.rand(moment.shape, generator=draw).to(moment.device)
            codes, scales = to_dynamic(moment, signed=name.startswith(FIRST), block=BLOCK, chance=chance)
            self.held |= {name: codes, SCALES + name: scales}
        elif held.dtype == torch.bfloat16:
            held.copy_(scattered(moment, draw))


def scattered(x: Tensor, draw: torch.Generator) -> Tensor:
    """float32 numbers on bf16's grid, rounded up or down by chance in proportion to how near these are."""
    bits = x.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, generator=draw, dtype=torch.int32).to(bits.device)
    return ((bits + chance) & -(1 << 16)).view(torch.float32)
