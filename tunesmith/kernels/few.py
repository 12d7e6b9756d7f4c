"""Products of few rows, as in writing: reading the weights is the work. And rows with changes of their own.

`nt` reads each row of a weight once, where it lies; `changes` adds to each row what the low-rank factors of its group
make of it, whatever number of groups there is. Sums are float32 and rounded once; nothing here has a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels import products
from tunesmith.kernels.build import DTYPES, Functions, pointer, threads, usable

MOST = {torch.bfloat16: 4, torch.float32: 24}  # rows: above, other products are faster


def nt(
    x: Tensor,
    ws: Sequence[Tensor],
    x2: Tensor | None = None,
    w2s: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """x w' + x2 w2' + bias, for several weights side by side: [rows, sum of outputs].

    Args:
        x: [rows, inputs].
        ws: each [outputs, inputs], contiguous.
        x2, w2s: [rows, r], and of each weight [its outputs, r]; all or none.
        biases: of each weight, [its outputs]; all or none.
    """
    if x.shape[0] >= products.FEWEST and products.fast(x.dtype):
        return products.nt(x, ws, x2, w2s or None, _joined(biases))
    if x.shape[0] > MOST.get(x.dtype, 0) or not usable(x, *ws, x2, *w2s, *biases):
        return plain_nt(x, ws, x2, w2s, biases)
    x, x2 = x.contiguous(), None if x2 is None else x2.contiguous()
    y = x.new_empty(x.shape[0], sum(len(w) for w in ws))
    rows, k, k2, start = x.shape[0], x.shape[1], 0 if x2 is None else x2.shape[1], 0
    at, a, a2, dtype, size = y.data_ptr(), pointer(x), pointer(x2), DTYPES[x.dtype], y.element_size()
    for number, w in enumerate(ws):
        kernels.ts_few(
            a, w.data_ptr(), a2, w2s[number].data_ptr() if w2s else None,
            biases[number].data_ptr() if biases else None, at + start * size, rows, k, k2, w.shape[0], y.shape[1],
            dtype, threads(),
        )  # fmt: skip
        start += len(w)
    return y


def plain_nt(
    x: Tensor,
    ws: Sequence[Tensor],
    x2: Tensor | None = None,
    w2s: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """The plain twin of `nt`."""
    parts = []
    for number, w in enumerate(ws):
        y = torch.nn.functional.linear(x, w, biases[number] if biases else None)
        parts.append(y if x2 is None else y + x2 @ w2s[number].T)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _joined(biases: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(biases)) if biases else None


@dataclass
class Factors:
    """Low-rank factors of some groups of rows, for one map.

    Attributes:
        pairs: of each group A [rank, inputs] and B [rank, outputs], contiguous and of one dtype, the scale in B; None
            for a group without a change.
    """

    pairs: list[tuple[Tensor, Tensor] | None]

    def __post_init__(self) -> None:
        held = [(0, 0, 0) if pair is None else (pair[0].data_ptr(), pair[1].data_ptr(), len(pair[0]))
                for pair in self.pairs]  # fmt: skip
        self.addresses = [torch.tensor([one[side] for one in held], dtype=torch.int64) for side in (0, 1)]
        self.ranks = torch.tensor([one[2] for one in held], dtype=torch.int32)
        self.most = max(one[2] for one in held)


def changes(y: Tensor, x: Tensor, factors: Factors, groups: Tensor) -> None:
    """Adds B A x to each row of y, by the factors of its group.

    Args:
        y: [rows, outputs], changed; rows may lie apart.
        x: [rows, inputs].
        groups: int32 [rows].
    """
    if not factors.most:
        return
    some = next(pair for pair in factors.pairs if pair is not None)
    if not usable(y, x, *some):
        return plain_changes(y, x, factors, groups)
    x = x.contiguous()
    spare = torch.empty((len(x) + 3) // 4 * 4 * factors.most)
    kernels.ts_few_changes(
        pointer(x), pointer(y), pointer(factors.addresses[0]), pointer(factors.addresses[1]), pointer(factors.ranks),
        pointer(groups), pointer(spare), len(x), x.shape[1], y.shape[1], y.stride(0), factors.most, DTYPES[x.dtype],
        threads(),
    )  # fmt: skip


def plain_changes(y: Tensor, x: Tensor, factors: Factors, groups: Tensor) -> None:
    """The plain twin of `changes`."""
    for group, pair in enumerate(factors.pairs):
        rows = (groups == group).nonzero()[:, 0]
        if pair is not None and len(rows):
            y[rows] += x[rows] @ pair[0].T @ pair[1]


kernels = Functions(
    ts_few="pppppp" "lllll" "ii",
    ts_few_changes="ppppppp" "lllll" "ii",
)  # fmt: skip
