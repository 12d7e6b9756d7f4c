"""Matrix products of training, with twins in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Weights = Tensor | Sequence[Tensor]


def nt(
    x: Tensor, w: Weights, x2: Tensor | None = None, w2: Weights | None = None, bias: Tensor | None = None
) -> Tensor:
    ws = [w] if isinstance(w, Tensor) else list(w)
    y = torch.nn.functional.linear(x, torch.cat(ws) if len(ws) > 1 else ws[0], bias)
    if x2 is not None and w2 is not None:
        w2s = [w2] if isinstance(w2, Tensor) else list(w2)
        y = y + x2 @ torch.cat(w2s).T
    return y


def nn(dy: Tensor, w: Weights, dy2: Tensor | None = None, w2: Tensor | None = None) -> Tensor:
    ws = [w] if isinstance(w, Tensor) else list(w)
    dx = dy @ (torch.cat(ws) if len(ws) > 1 else ws[0])
    return dx if dy2 is None else dx + dy2 @ w2


def tn(a: Tensor, b: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    found = (a.T @ b).float() * scale
    return found if out is None else out.add_(found)
