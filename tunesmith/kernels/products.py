"""Matrix products of training in bfloat16 on AMX or AVX-512 (gemm.c), and plain twins in torch for everything else.

The kernels sum in float32 over all operands of a call and round once; weights are read where they lie, several of them
as one. No gradient flows through these: they are for the inside of a hand-written backward, and where gradients are
asked for the twins run. Switched off with the saving "products".
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tunesmith.core.switches import on
from tunesmith.kernels.build import Functions, imitating, library, threads, usable, worked

Weights = Tensor | Sequence[Tensor]

FEWEST = 24  # rows: below, packing the weight is not worth it
LEAST = 65536  # rows x columns x summed: below, torch's own call is the shorter


def fast(dtype: torch.dtype) -> bool:
    """Whether products of this dtype have a kernel on this machine, and it is not switched off."""
    return dtype == torch.bfloat16 and on("products") and _has_tiles()


def nt(
    x: Tensor,
    w: Weights,
    x2: Tensor | None = None,
    w2: Weights | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x w' + x2 w2' + bias: [rows, outputs].

    Args:
        x: [rows, inputs]; rows may lie apart.
        w: [outputs, inputs], or several, whose outputs lie side by side.
        x2, w2: [rows, r] and [outputs, r], a second product into the same sums. Several w2 lie one below the other,
            each as wide as x2, or each with its own columns of x2, one after the other (block-diagonal).
        bias: [outputs].
        out: [rows, outputs], contiguous, where the result belongs; it is changed and returned.
    """
    ws, w2s = _several(w), _several(w2)
    n = sum(one.shape[0] for one in ws)
    if _ours(x.shape[0], n, x, *ws, x2, *w2s, bias, out):
        y = x.new_empty(x.shape[0], n) if out is None else out
        if _product(0, y, (x, ws), (x2, w2s), bias):
            return y
    if out is not None and x2 is None and len(ws) == 1:
        return torch.mm(x, ws[0].T, out=out) if bias is None else torch.addmm(bias, x, ws[0].T, out=out)
    y = plain_nt(x, ws, x2, w2s, bias)
    return y if out is None else out.copy_(y)


def plain_nt(
    x: Tensor, w: Weights, x2: Tensor | None = None, w2: Weights | None = None, bias: Tensor | None = None
) -> Tensor:
    """The plain twin of `nt`."""
    y = _side_by_side(x, _several(w), bias)
    if x2 is None or w2 is None or not len(w2):
        return y
    w2s = _several(w2)
    if _dense(w2s, x2.shape[-1]):
        return y + x2 @ _below(w2s).T
    parts = x2.split([one.shape[1] for one in w2s], -1)
    return y + torch.cat([part @ one.T for part, one in zip(parts, w2s, strict=True)], -1)


def nn(
    dy: Tensor, w: Weights, dy2: Tensor | None = None, w2: Weights | None = None, out: Tensor | None = None
) -> Tensor:
    """dy w + dy2 w2: [rows, inputs].

    Args:
        dy: [rows, outputs]; rows may lie apart.
        w: [outputs, inputs], or several, one below the other.
        dy2, w2: [rows, r] and [r, inputs] (or several, one below the other), a second product into the same sums.
        out: [rows, inputs], contiguous, where the result belongs; it is changed and returned.
    """
    ws, w2s = _several(w), _several(w2)
    n = ws[0].shape[1]
    if _ours(dy.shape[0], n, dy, *ws, dy2, *w2s, out):
        dx = dy.new_empty(dy.shape[0], n) if out is None else out
        if _product(1, dx, (dy, ws), (dy2, w2s), None):
            return dx
    if out is not None and dy2 is None and len(ws) == 1:
        return torch.mm(dy, ws[0], out=out)
    dx = plain_nn(dy, ws, dy2, w2s)
    return dx if out is None else out.copy_(dx)


def plain_nn(dy: Tensor, w: Weights, dy2: Tensor | None = None, w2: Weights | None = None) -> Tensor:
    """The plain twin of `nn`."""
    dx = _summed(dy, _several(w))
    return dx if dy2 is None or w2 is None or not len(w2) else dx + dy2 @ _below(w2)


def tn(a: Tensor, b: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale a' b in float32, added to `out` where it is given: the gradient of a weight.

    Args:
        a: [rows, n]; rows may lie apart.
        b: [rows, k]; likewise.
        out: [n, k], float32; it is changed and returned.
    """
    if a.dim() == 2 and b.dim() == 2 and _ours(a.shape[0], a.shape[1] * b.shape[1], a, b) and _plain_out(out):
        found = torch.empty(a.shape[1], b.shape[1]) if out is None else out
        if _gradient(a, b, found, out is not None, scale):
            return found
    return plain_tn(a, b, out, scale)


def plain_tn(a: Tensor, b: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The plain twin of `tn`."""
    found = (a.T @ b).float() * scale
    return found if out is None else out.add_(found)


def _several(w: Weights | None) -> list[Tensor]:
    return [] if w is None else [w] if isinstance(w, Tensor) else list(w)


def _below(w: Weights) -> Tensor:
    several = _several(w)
    return torch.cat(several) if len(several) > 1 else several[0]


def _side_by_side(x: Tensor, ws: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x w' + bias of several maps; where no gradient is asked for, without a copy of weights or outputs."""
    if len(ws) == 1 or torch.is_grad_enabled() or x.dim() != 2:
        return torch.nn.functional.linear(x, _below(ws), bias)
    sizes = [w.shape[0] for w in ws]
    y = x.new_empty(x.shape[0], sum(sizes))
    for part, w in zip(y.split(sizes, -1), ws, strict=True):
        torch.mm(x, w.T, out=part)
    return y if bias is None else y.add_(bias)


def _summed(dy: Tensor, ws: Sequence[Tensor]) -> Tensor:
    """dy w of several maps."""
    if len(ws) == 1 or torch.is_grad_enabled() or dy.dim() != 2:
        return dy @ _below(ws)
    first, *others = zip(dy.split([w.shape[0] for w in ws], -1), ws, strict=True)
    dx = first[0] @ first[1]
    for part, w in others:
        dx.addmm_(part, w)
    return dx


def _dense(w2s: Sequence[Tensor], width: int) -> bool:
    return all(one.shape[1] == width for one in w2s)


def _ours(rows: int, columns: int, first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel can take these and is worth calling."""
    if rows < FEWEST or first.dim() != 2 or rows * columns * first.shape[1] < LEAST or not fast(first.dtype):
        return False
    there = [one for one in others if one is not None]
    if not usable(first, *there):
        return False
    flows = torch.is_grad_enabled()
    return not any(
        one.dtype is not torch.bfloat16 or not one.numel() or (flows and one.requires_grad) for one in (first, *there)
    )


def _plain_out(out: Tensor | None) -> bool:
    return out is None or (usable(out) and out.dtype == torch.float32 and out.stride(1) == 1)


def _product(
    by_columns: int,
    out: Tensor,
    first: tuple[Tensor, list[Tensor]],
    second: tuple[Tensor | None, list[Tensor]],
    bias: Tensor | None,
) -> bool:
    """Runs the kernel; False where it could not."""
    m, n = out.shape
    call, pieces, kept, summed = array("q", (by_columns, m, n)), array("q"), [], 0
    for a, weights in (first, second):
        if a is None or not weights:
            call.extend((0, 0, 0, 0))
            continue
        a, weights = _rows(a), [_rows(one) for one in weights]
        k = a.shape[1]
        _check(by_columns, n, k, weights)
        summed += k
        if imitating():
            continue
        kept += [a, *weights]  # copies must live until the kernel has run
        call.extend((a.data_ptr(), a.stride(0), k, len(weights)))
        pieces.extend(_pieces(weights, k, by_columns))
    worked(2 * m * n * summed)
    if imitating():
        return True
    bias = None if bias is None else bias.contiguous()
    call.extend((0 if bias is None else bias.data_ptr(), out.data_ptr(), threads()))
    call.extend(pieces)
    return not kernels.ts_product(call.buffer_info()[0])


def _gradient(a: Tensor, b: Tensor, out: Tensor, add: bool, scale: float) -> bool:
    """Runs the kernel; False where it could not. The narrower operand is the one that is turned."""
    if a.shape[0] != b.shape[0] or out.shape != (a.shape[1], b.shape[1]):
        raise ValueError(f"{list(a.shape)} and {list(b.shape)} do not make {list(out.shape)}")
    worked(2 * a.numel() * b.shape[1])
    if imitating():
        return True
    turned = a.shape[1] > b.shape[1]
    a, b = (_rows(b), _rows(a)) if turned else (_rows(a), _rows(b))
    failed = kernels.ts_gradient(
        a.shape[0], a.shape[1], b.shape[1], a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        out.data_ptr(), out.stride(0), turned, add, scale, threads(),
    )  # fmt: skip
    return not failed


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which may lie apart."""
    apart, step = x.stride()
    return x if step == 1 and apart >= x.shape[1] else x.contiguous()


def _check(by_columns: int, n: int, k: int, weights: Sequence[Tensor]) -> None:
    """Raises ValueError where weights do not fit: the kernel would read what is not theirs."""
    if len(weights) == 1 and weights[0].shape == ((k, n) if by_columns else (n, k)):
        return
    rows, widths = sum(one.shape[0] for one in weights), [one.shape[1] for one in weights]
    if by_columns:
        fit = rows == k and all(width == n for width in widths)
    else:
        fit = rows == n and (all(width == k for width in widths) or sum(widths) == k)
    if not fit:
        shapes = [list(one.shape) for one in weights]
        raise ValueError(f"weights {shapes} do not fit {k} inputs and {n} outputs")


def _pieces(weights: Sequence[Tensor], k: int, by_columns: int) -> list[int]:
    """What gemm.c calls pieces: address, rows, row stride, width and first column of each."""
    if len(weights) == 1:
        (one,) = weights
        return [one.data_ptr(), one.shape[0], one.stride(0), one.shape[1], 0]
    dense, start = bool(by_columns) or _dense(weights, k), 0
    found: list[int] = []
    for one in weights:
        rows, width = one.shape
        found += (one.data_ptr(), rows, one.stride(0), width, 0 if dense else start)
        start += width
    return found


@cache
def _has_tiles() -> bool:
    held = library()
    return held is not None and bool(held.ts_has_tiles())


kernels = Functions(ts_product="p", ts_gradient="lllplplpliifi")
