"""Products with weights that stay as they are, laid out once as the hardware reads them; and the plain twin.

A product of some rows in bfloat16 spends more time on laying the weight out than on anything else. What is laid out is
a copy, so it is made only where the same weights will be read many times. Where tiles.h has products the layout is our
own (packed.c), in one room for all weights, so that reading them is one stream; elsewhere it is oneDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.switches import on
from tunesmith.kernels import products
from tunesmith.kernels.build import Functions, pointer, threads, usable

_LARGE = 2 << 20  # bytes of a large page


class Packed:
    """Weights [outputs, inputs] side by side, and their biases [outputs], of which there is one for each or none."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), rows: int = 32) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.bias = joined([bias.detach() for bias in biases]) if biases else None
        whole = joined(self.weights)
        self.held = torch.ops.mkldnn._reorder_linear_weight(whole, rows) if _can(whole) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x w' + bias for x [rows, inputs]: [rows, sum of outputs]. No gradient flows through it."""
        if self.held is None:
            return plain(x, self.weights, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.held, self.bias, "none", [], "")
        return y


class Arena:
    """Room for weights of the sizes [outputs, inputs] as tiles read them."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.room = torch.empty(sum(map(_bytes, sizes)) + _LARGE, dtype=torch.uint8)
        kernels.ts_pack_room(pointer(self.room), self.room.numel())
        self.used = -self.room.data_ptr() % _LARGE

    def put(self, weight: Tensor) -> Tensor:
        """A weight, bfloat16 [outputs, inputs], laid out."""
        weight = weight.detach().contiguous()
        found = self.room[self.used : self.used + _bytes(tuple(weight.shape))]
        self.used += len(found)
        kernels.ts_pack(pointer(weight), pointer(found), *weight.shape)
        return found


def tiled(x: Tensor, laid: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """x w' + bias by tiles, for x [rows, inputs] and a weight of so many outputs that an arena has laid out."""
    x = x.contiguous()
    y, blocks = x.new_empty(len(x), outputs), scratch(*x.shape)
    kernels.ts_packed(
        pointer(x), pointer(laid), pointer(bias), pointer(y), pointer(blocks), len(x), outputs, x.shape[1], threads()
    )
    return y


def can_tile(dtype: torch.dtype) -> bool:
    """Whether weights can be laid out for tiles here."""
    return products.fast(dtype)


def scratch(rows: int, inputs: int) -> Tensor:
    """Room for so many rows as tiles read them."""
    return torch.empty(_bytes((rows, inputs)), dtype=torch.uint8)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One below the other."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def plain(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The plain twin."""
    y = torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], 1)
    return y if bias is None else y + bias


def _can(weight: Tensor) -> bool:
    known = weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return on("products") and torch.backends.mkldnn.is_available() and usable(weight) and known


def _bytes(size: tuple[int, ...]) -> int:
    rows, columns = (-(-side // 32) * 32 for side in size)
    return 2 * rows * columns


kernels = Functions(ts_pack="ppll", ts_pack_room="pl", ts_packed="pppppllli")
