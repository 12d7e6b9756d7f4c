"""Attention inside documents that lie end to end, forward and backward, and its plain twin.

Scores and sums are float32 and the result is rounded once; the backward keeps q, k, v and one float a query and
head, and makes the weights again (Dao 2023, arXiv 2307.08691). Where the kernel cannot run (attention.c; a tracer,
a dtype or device that it lacks) the plain twin does.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.core.switches import on
from tunesmith.kernels.build import DTYPES, Functions, imitating, threads, usable, worked

Spans = tuple[tuple[int, int, int, int, int], ...]
WIDEST = 256  # of a head
TILES = True  # in bfloat16 where tiles.h has products; else in floats
_TOLD = {1: MemoryError("no memory for attention"), 2: ValueError("spans leave their rows, or have queries in common")}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """Softmax of scaled products of queries and keys, times values, inside spans of packed rows.

    Args:
        q: [queries, heads, width], float32 or bfloat16; k, v: [keys, kv heads, width]. Any strides.
        spans: (first query, end of queries, first of their own keys, first key before these, end of those) of each.
            There are as many own keys as queries, seen causally if `causal`; those before are seen by all. No query may
            be in two spans; keys may. What is in none gets zeros.
        scale: of the products; width ** -0.5 by default.
        window: a query sees itself and the `window - 1` own keys before it; 0 for all.
        cap: scaled scores s become cap x tanh(s / cap) (Gemma 2, 2024, arXiv 2408.00118, section 2); 0 leaves them.

    Returns:
        [queries, heads, width], contiguous, differentiable once in q, k and v; the same for any number of threads.

    Raises:
        ValueError: spans that cannot be, or a window without causal attention.
    """
    if window and not causal:
        raise ValueError("a window without causal attention")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not takes(q, k, v, scale):
        return plain_attention(q, k, v, spans, causal, scale, window, cap)
    o: Tensor = _Attention.apply(q, k, v, _How(spans, causal, scale, window, cap))  # type: ignore[no-untyped-call]
    return o


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernel can run on these."""
    alike = q.dtype == k.dtype == v.dtype and q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    return alike and q.shape[2] <= WIDEST and scale > 0 and on("attention") and usable(q, k, v)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool, scale: float, window: int = 0, cap: float = 0.0
) -> Tensor:
    """The plain twin of `attention`: any dtype and device."""
    found = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for start, end, own, first, after in spans:
        keys, values = (torch.cat([x[first:after], x[own : own + end - start]]).transpose(0, 1)[None] for x in (k, v))
        at = torch.arange(end - start, device=q.device)
        ahead = at[:, None] - at[None]
        seen = (ahead >= 0) & (ahead < (window or end - start)) if causal else ahead == ahead
        seen = torch.cat([seen.new_ones(end - start, after - first), seen], 1)
        queries = q[start:end].transpose(0, 1)[None]
        if cap:
            part = capped(queries, keys, values, seen, scale, cap)
        else:
            part = scaled_dot_product_attention(
                queries, keys, values, seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        found = found.index_put((torch.arange(start, end, device=q.device),), part[0].transpose(0, 1))
    return found


def capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float, dropout: float = 0.0
) -> Tensor:
    """Attention with capped scores, written out: no kernel of torch caps them.

    Args:
        query: [batch, heads, queries, width]; key, value: [batch, kv heads, keys, width].
        mask: true where a query may look, or what is added to scores; [..., queries, keys].
    """
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(2, 3) * scale
    scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def on_gpu(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool, scale: float, window: int) -> Tensor | None:
    """The same by torch's own kernel for documents of many lengths, or None where that cannot be.

    It takes float16 and bfloat16 on CUDA, spans without keys before their own, and a torch that lets it be scaled. Not
    run by any test of this project: there is no such device where they run.
    """
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    if not fits or q.shape[2] > WIDEST or q.shape[2] % 8 or not on("attention"):
        return None
    varlen, lengths = _varlen(), tuple(end - start for start, end, *_ in spans)
    whole = all(start == own and first == after for start, _, own, first, after in spans)
    if varlen is None or not whole or sum(lengths) != q.shape[0] != 0 or k.shape[0] != q.shape[0]:
        return None
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    ends = _ends(lengths, q.device)
    found: Tensor = varlen(
        q, k, v, ends, ends, max(lengths), max(lengths),
        scale=scale, window_size=(window - 1 if window else -1, 0 if causal else -1), enable_gqa=True,
    )  # fmt: skip
    return found


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's attention for documents of many lengths, where it is and takes what is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    there = set(inspect.signature(varlen_attn).parameters)
    return varlen_attn if there >= {"scale", "window_size", "enable_gqa"} else None


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents end, from 0: copied to the device once a batch, not once a block."""
    with torch.inference_mode(False):
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: _How) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        o, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        ctx.how = how
        ctx.save_for_backward(q, k, v, lse)
        _run(kernels.ts_attention, 2, how, lse, q=q, k=k, v=v, o=o)
        return o

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        _run(kernels.ts_attention_backward, 5, ctx.how, lse, q=q, k=k, v=v, grad=grad, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, None


@dataclass(frozen=True)
class _How:
    spans: Spans
    causal: bool
    scale: float
    window: int
    cap: float


class _Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Call(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "o", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "spans")),
        *((name, ctypes.c_int64) for name in ("count", "queries", "keys", "heads", "kv_heads", "width", "window")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        *((name, ctypes.c_int32) for name in ("dtype", "causal", "threads", "tiles")),
    ]


def _run(function: Callable[..., int], products: int, how: _How, lse: Tensor, **tensors: Tensor) -> None:
    (queries, heads, width), (keys, kv_heads, _) = tensors["q"].shape, tensors["k"].shape
    squares = sum((end - start) * (end - start + after - first) for start, end, _, first, after in how.spans)
    worked(2 * products * heads * width * squares)  # whole squares, as torch counts its own attention
    if imitating():
        return
    numbers = _numbers(how.spans)  # held while its address is used
    call = _Call(
        **{key: _Rows(x.data_ptr(), x.stride(0), x.stride(1)) for key, x in tensors.items()},
        lse=lse.data_ptr(), spans=ctypes.addressof(numbers), count=len(how.spans), queries=queries, keys=keys,
        heads=heads, kv_heads=kv_heads, width=width, window=how.window, scale=how.scale, cap=how.cap, causal=how.causal,
        dtype=DTYPES[tensors["q"].dtype], threads=threads(), tiles=TILES,
    )  # fmt: skip
    code = function(ctypes.addressof(call))
    if code:
        raise _TOLD[code]


@lru_cache(maxsize=8)
def _numbers(spans: Spans) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * (5 * len(spans)))(*(number for span in spans for number in span))


kernels = Functions(ts_attention="p", ts_attention_backward="p")
