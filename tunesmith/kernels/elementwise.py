"""Norms, rotary positions, gated activations and cross-entropy: few passes over memory, and plain twins.

Inside, everything is float32; results are rounded once. What the backward keeps is named with each function. Where
the kernels cannot run (elementwise.c; another device, a dtype they lack, a tracer) the plain twins do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.core.switches import on
from tunesmith.kernels.build import DTYPES, Functions, imitating, pointer, threads, usable

KINDS = ("silu", "gelu_tanh", "gelu")
BLOCKS = 16  # blocks of rows that sum a weight's gradient apart: fixed, so that no result depends on the threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) along the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: [..., width], float32 or bfloat16; the backward keeps it, and one float a row.
        weight: [width], of either dtype, trained or frozen.
        eps: added to the mean of squares.
        offset: 1 where the weight is kept as a difference from one (gemma).
    """
    if not _ours(x, weight):
        return plain_rms_norm(x, weight, eps, offset)
    y: Tensor = _run(_Norm, x, weight, eps, offset)
    return y


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The plain twin of `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)


def add_rms_norm(x: Tensor, r: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """x + r and its `rms_norm`; the backward keeps the sum, and one float a row."""
    if not (_ours(x, r, weight) and x.shape == r.shape and x.dtype == r.dtype):
        return plain_add_rms_norm(x, r, weight, eps, offset)
    found: tuple[Tensor, Tensor] = _run(_AddNorm, x, r, weight, eps, offset)
    return found


def plain_add_rms_norm(x: Tensor, r: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The plain twin of `add_rms_norm`."""
    total = x + r
    return total, plain_rms_norm(total, weight, eps, offset)


def norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`rms_norm` of each head of queries and keys, and values as they are (Qwen3 2025, arXiv 2505.09388, section 2).

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * width], as in `split_rope`; the backward keeps it, and a float a head.
        q_weight, k_weight: [width], of one dtype.
    """
    if not (_ours(qkv, q_weight, k_weight) and q_weight.dtype == k_weight.dtype):
        return plain_norm_heads(qkv, q_weight, k_weight, heads, kv_heads, eps, offset)
    y: Tensor = _run(_NormHeads, qkv, q_weight, k_weight, heads, kv_heads, eps, offset)
    return y


def plain_norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float = 0.0
) -> Tensor:
    """The plain twin of `norm_heads`."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    q, k = plain_rms_norm(q, q_weight, eps, offset), plain_rms_norm(k, k_weight, eps, offset)
    return torch.cat([q, k, v], 1).flatten(1)


def split_rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions, and values, out of one product.

    A head's first half a and second half b become a cos - b sin and b cos + a sin (Su et al. 2021, arXiv 2104.09864,
    with the halves apart as in llama). The backward keeps nothing but the tables.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * width]: all queries, then keys, then values.
        cos, sin: [tokens, turned]; where `turned` < width the columns beyond it stay. No gradient is made for them.

    Returns:
        q [tokens, heads, width], k and v [tokens, kv_heads, width], contiguous.
    """
    if not (_ours(qkv, cos, sin) and cos.dtype == sin.dtype and cos.shape == sin.shape):
        return plain_split_rope(qkv, cos, sin, heads, kv_heads)
    found: tuple[Tensor, Tensor, Tensor] = _run(_Rope, qkv, cos, sin, heads, kv_heads)
    return found


def plain_split_rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The plain twin of `split_rope`."""
    turned = cos.shape[-1]
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)

    def turn(x: Tensor) -> Tensor:
        inner, beyond = x[..., :turned], x[..., turned:]
        a, b = inner.chunk(2, -1)
        found = inner * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]
        return torch.cat([found.to(x.dtype), beyond], -1)

    return turn(q), turn(k), v.contiguous()


def gated(gu: Tensor, kind: str) -> Tensor:
    """act(gate) * up: [..., 2 width] -> [..., width] (Shazeer 2020, arXiv 2002.05202). The backward keeps `gu`.

    Args:
        gu: the gate's columns, then those of up.
        kind: the activation: "silu", "gelu_tanh" or "gelu".
    """
    if not _ours(gu):
        return plain_gated(gu, kind)
    y: Tensor = _run(_Gated, gu, KINDS.index(kind))
    return y


def plain_gated(gu: Tensor, kind: str) -> Tensor:
    """The plain twin of `gated`."""
    gate, up = gu.chunk(2, -1)
    if kind == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate={"gelu_tanh": "tanh", "gelu": "none"}[kind]) * up


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float = 1.0, cap: float | None = None, *, gradient: bool = True
) -> Tensor:
    """Negative log-likelihoods of the targets; the logits become the gradient of their sum, in place.

    Args:
        logits: [rows, vocabulary], contiguous: the raw product of states and head. Nothing is recorded for autograd.
        targets: int64 [rows].
        scale, cap: logits are scale x product, and then cap x tanh(logit / cap) where there is a cap.
        gradient: whether it is wanted; without it the logits stay.

    Returns:
        [rows], float32 (float64 for logits in float64).

    Raises:
        IndexError: a target is no row of the vocabulary.
    """
    if not (_ours(logits) and logits.is_contiguous()):
        return plain_cross_entropy_(logits, targets, scale, cap, gradient=gradient)
    rows, width = logits.shape
    if rows and not imitating() and not 0 <= int(targets.min()) <= int(targets.max()) < width:
        raise IndexError(f"targets must be in [0, {width})")
    losses = torch.empty(rows, dtype=torch.float32)
    powers = torch.empty(threads(), width)
    kernels.ts_cross_entropy(
        pointer(logits), pointer(targets.contiguous()), pointer(losses), pointer(powers),
        rows, width, scale, cap or 0.0, gradient, DTYPES[logits.dtype], threads(),
    )  # fmt: skip
    return losses


def plain_cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float = 1.0, cap: float | None = None, *, gradient: bool = True
) -> Tensor:
    """The plain twin of `cross_entropy_`."""
    shaped = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        shaped = shaped * scale
    if cap is not None:
        shaped = cap * torch.tanh(shaped / cap)
    total, wanted = torch.logsumexp(shaped, -1), targets[:, None]
    losses = total - shaped.gather(1, wanted)[:, 0]
    if gradient:
        pull = torch.exp(shaped - total[:, None])
        pull.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=pull.dtype))
        if cap is not None:
            pull *= 1 - (shaped / cap).square()
        logits.copy_(pull if scale == 1.0 else pull * scale)
    return losses


class _Nobody:
    """Takes what a forward would keep, where no backward follows: half of the time of a call that has few rows."""

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _run(function: type[torch.autograd.Function], *given: Any) -> Any:
    if torch.is_grad_enabled():
        return function.apply(*given)  # type: ignore[no-untyped-call]
    return function.forward(_Nobody(), *given)


def _ours(*tensors: Tensor) -> bool:
    return on("elementwise") and usable(*tensors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = _norm(x, None, None, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = _norm_back(dy, None, x, weight, inverse, ctx.offset, ctx.needs_input_grad[1])
        return dx, dweight, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        x, r, weight = x.contiguous(), r.contiguous(), weight.contiguous()
        total = torch.empty_like(x)
        y, inverse = _norm(x, r, total, weight, eps, offset)
        ctx.save_for_backward(total, weight, inverse)
        ctx.set_materialize_grads(False)
        ctx.offset = offset
        return total, y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dtotal, dtotal, None, None, None
        total, weight, inverse = ctx.saved_tensors
        dx, dweight = _norm_back(dy, dtotal, total, weight, inverse, ctx.offset, ctx.needs_input_grad[2])
        return dx, dx, dweight, None, None


def _norm(
    x: Tensor, r: Tensor | None, total: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The normed rows, and 1 / rms of each in float32; `total` becomes x + r where there is an r."""
    y, width = torch.empty_like(x), x.shape[-1]
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32)
    kernels.ts_rms_norm(
        pointer(x), pointer(r), pointer(weight), pointer(total), pointer(y), pointer(inverse),
        inverse.numel(), width, eps, offset, DTYPES[x.dtype], DTYPES[weight.dtype], threads(),
    )  # fmt: skip
    return y, inverse


def _norm_back(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, with `dtotal` added, and of the weight where it trains."""
    dy, dtotal = dy.contiguous(), None if dtotal is None else dtotal.contiguous()
    dx, width = torch.empty_like(x), x.shape[-1]
    sums = torch.zeros(BLOCKS, width) if trained else None
    kernels.ts_rms_norm_back(
        pointer(dy), pointer(x), pointer(weight), pointer(inverse), pointer(dtotal), pointer(dx), pointer(sums),
        BLOCKS, inverse.numel(), width, offset, DTYPES[x.dtype], DTYPES[weight.dtype], threads(),
    )  # fmt: skip
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float
    ) -> Tensor:
        qkv, q_weight, k_weight = qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous()
        y, inverse = torch.empty_like(qkv), torch.empty(len(qkv), heads + kv_heads, dtype=torch.float32)
        kernels.ts_norm_heads(
            pointer(qkv), pointer(q_weight), pointer(k_weight), pointer(y), pointer(inverse),
            len(qkv), heads, kv_heads, len(q_weight), eps, offset, DTYPES[qkv.dtype], DTYPES[q_weight.dtype], threads(),
        )  # fmt: skip
        ctx.save_for_backward(qkv, q_weight, k_weight, inverse)
        ctx.heads, ctx.offset = (heads, kv_heads), offset
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (qkv, q_weight, k_weight, inverse), dy = ctx.saved_tensors, dy.contiguous()
        dx, width = torch.empty_like(qkv), len(q_weight)
        sums = torch.zeros(BLOCKS, 2, width) if any(ctx.needs_input_grad[1:3]) else None
        kernels.ts_norm_heads_back(
            pointer(dy), pointer(qkv), pointer(q_weight), pointer(k_weight), pointer(inverse), pointer(dx),
            pointer(sums), BLOCKS, len(qkv), *ctx.heads, width, ctx.offset, DTYPES[qkv.dtype], DTYPES[q_weight.dtype],
            threads(),
        )  # fmt: skip
        found = (None, None) if sums is None else sums.sum(0).to(q_weight.dtype)
        return dx, found[0], found[1], None, None, None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        rows, width = len(qkv), qkv.shape[1] // (heads + 2 * kv_heads)
        q = qkv.new_empty(rows, heads, width)
        k, v = (qkv.new_empty(rows, kv_heads, width) for _ in range(2))
        _rope(qkv, cos, sin, q, k, v, back=0)
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        return q, k, v

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dqkv = dq.new_empty(ctx.shape)
        _rope(dqkv, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous(), back=1)
        return dqkv, None, None, None, None


def _rope(joined: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor, back: int) -> None:
    rows, heads, width = q.shape
    kernels.ts_split_rope(
        pointer(joined), pointer(cos), pointer(sin), pointer(q), pointer(k), pointer(v),
        rows, heads, k.shape[1], width, cos.shape[1], back, DTYPES[q.dtype], DTYPES[cos.dtype], threads(),
    )  # fmt: skip


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gu: Tensor, kind: int) -> Tensor:
        gu = gu.contiguous()
        width = gu.shape[-1] // 2
        y = gu.new_empty(*gu.shape[:-1], width)
        rows = y.numel() // max(width, 1)
        kernels.ts_gated(pointer(gu), pointer(y), rows, width, kind, DTYPES[gu.dtype], threads())
        ctx.save_for_backward(gu)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gu,), dy = ctx.saved_tensors, dy.contiguous()
        dgu, width = torch.empty_like(gu), dy.shape[-1]
        rows = dy.numel() // max(width, 1)
        kernels.ts_gated_back(
            pointer(dy), pointer(gu), pointer(dgu), rows, width, ctx.kind, DTYPES[gu.dtype], threads()
        )
        return dgu, None


kernels = Functions(
    ts_rms_norm="pppppp" "ll" "ff" "iii",
    ts_rms_norm_back="ppppppp" "lll" "f" "iii",
    ts_norm_heads="ppppp" "llll" "ff" "iii",
    ts_norm_heads_back="ppppppp" "lllll" "f" "iii",
    ts_split_rope="pppppp" "lllll" "i" "iii",
    ts_gated="pp" "ll" "i" "ii",
    ts_gated_back="ppp" "ll" "i" "ii",
    ts_cross_entropy="pppp" "ll" "ff" "iii",
)  # fmt: skip
