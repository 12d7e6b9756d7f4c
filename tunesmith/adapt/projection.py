"""A random projection of few numbers to the weights of one map, computed when it is needed and stored nowhere.

The one idea: weight i is `entry` times z[h(i)] times a sign, and h is arithmetic on 32-bit integers, which is the same
on every device. Forward and backward each compute it again, so that nothing of the size of the map is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.models.inserts import Insert
from tunesmith.models.targets import input_features, output_features

if TYPE_CHECKING:
    from tunesmith.models.inserts import Acts

_SPREAD, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd numbers of MurmurHash3's last step


class Projection(Insert):
    """One map's part of the projection.

    Args:
        z: the numbers that are trained, float32 [dimension], or another part, which has them.
        salt: makes this part differ from the others.
        entry: size of the projection's entries.
    """

    def __init__(self, method: Acts, z: nn.Parameter | Projection, salt: int, entry: float) -> None:
        super().__init__(method, {"z": z} if isinstance(z, nn.Parameter) else {}, None, 1.0)
        self.salt, self.entry = salt, entry
        # in a tuple, so that it is no submodule and z counts once
        self._owner = (z,) if isinstance(z, Projection) else (self,)

    @property
    def z(self) -> Tensor:
        """The trained numbers, one parameter for all parts."""
        return self._owner[0]["z"]

    def applied(self, x: Tensor) -> Tensor:
        """(P z) x in the dtype of x: [..., outputs]."""
        out: Tensor = _Applied.apply(x, self.z, self)  # type: ignore[no-untyped-call]
        return out

    def matrix(self, z: Tensor) -> Tensor:
        """P z as the map's weights: float32 [outputs, inputs]."""
        places, signs = self._hashed(z)
        base = self.port.base
        return (z[places] * signs).view(output_features(base), input_features(base))

    def gathered(self, change: Tensor, z: Tensor) -> Tensor:
        """P transposed times weights [outputs, inputs]: [dimension]."""
        places, signs = self._hashed(z)
        return torch.zeros_like(z).index_add_(0, places, change.flatten() * signs)

    def _hashed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """For each weight, which of the numbers moves it, and by how much of it: int32 and float32 [weights]."""
        base = self.port.base
        h = torch.arange(output_features(base) * input_features(base), dtype=torch.int32, device=z.device)
        h.mul_(_wrapped(_SPREAD)).add_(_wrapped(self.salt))
        for shift, factor in ((16, _FIRST), (13, _SECOND), (16, 1)):
            # a shift of a negative number brings ones in from the left
            h.bitwise_xor_((h >> shift) & ((1 << (32 - shift)) - 1)).mul_(_wrapped(factor))
        signs = torch.where(h < 0, -self.entry, self.entry)
        return h.bitwise_and_(0x7FFFFFFF).remainder_(z.numel()), signs.to(z.dtype)


class _Applied(torch.autograd.Function):
    """A linear map by the projected weights, which are made twice rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, part: Projection) -> Tensor:
        ctx.save_for_backward(x, z)
        ctx.part = part
        return nn.functional.linear(x, part.matrix(z).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, z = ctx.saved_tensors
        weights = ctx.part.matrix(z).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        change = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return gradient @ weights if weights is not None else None, ctx.part.gathered(change.to(z.dtype), z), None


def _wrapped(number: int) -> int:
    """The low 32 bits of a number as a signed one."""
    return ((number + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
