"""Attention inside documents: one row holds many of them end to end, and each attends to itself alone.

The one idea: this is an attention function of transformers' own interface, so that no model code is touched. With
`Segments` (route.py) documents run together in one kernel (kernels/attention.py) or, where that cannot be, one by one
through scaled dot-product attention; without, it is transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.core.errors import ModelError
from tunesmith.kernels.attention import Spans, attention, capped, on_gpu, takes
from tunesmith.models.prefixes import Pair, preceding, side_by_side
from tunesmith.models.route import Segments, current_segments, holding

NAME = "tunesmith"
# up to so many tokens torch's CPU kernel is faster in float32 than in bfloat16, forward and backward together: 3.4
# times at 128, 1.4 at 256, 1.1 at 512; at 1024 it is slower
_WIDE_TOKENS = 512
_hearing: ContextVar[Callable[[nn.Module, Tensor, Tensor], None] | None] = ContextVar("tunesmith_hearing", default=None)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of query [batch, heads, tokens, width] over key and value [batch, kv heads, tokens, width].

    Args:
        attention_mask: None within segments; else boolean or additive [batch, 1, tokens, tokens], or None.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.
        softcap: scores s become softcap x tanh(s / softcap) (Gemma 2, 2024, arXiv 2408.00118, section 2).

    Returns:
        [batch, tokens, heads, width] and no weights.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    segments = current_segments()
    hear = _hearing.get()
    if hear is not None:
        hear(module, key, value)
    before = preceding(module, key, query.shape[0] if segments is None else len(segments.lengths))
    if segments is None:
        if before is not None:
            own = attention_mask if attention_mask is not None else _window(query, key, causal, None)
            key, value, attention_mask = _preceded(query, key, value, own, before)
            is_causal = False
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
            )
        given = before is not None or attention_mask is not None
        mask = attention_mask if given else _window(query, key, causal, None)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return capped(query, key, value, mask, scale, softcap, dropout).transpose(1, 2).contiguous(), None
    if query.shape[0] != 1 or query.shape[2] != sum(segments.lengths) or key.shape[2] != query.shape[2]:
        raise ModelError(f"segments of {sum(segments.lengths)} tokens over a row of shape {tuple(query.shape)}")
    if sliding_window is not None and not causal:
        raise ModelError("a sliding window without causal attention cannot run packed")
    if segments.prefixes:
        _check_going_on(segments, before, sliding_window)
    if not dropout:
        found = _fused(query, key, value, segments.spans, before, causal, scaling, sliding_window, softcap)
        if found is not None:
            return found[None], None
    lengths = list(segments.lengths)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    pairs = _gone_on_from(segments, key, value) if segments.prefixes else before or [None] * len(lengths)
    outputs = [
        _one(*part, pair, causal, dropout, scaling, sliding_window, softcap)
        for part, pair in zip(parts, pairs, strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that goes with `attend`: none within segments, else the one of sdpa."""
    return None if current_segments() is not None else sdpa_mask(*args, **kwargs)


@contextmanager
def hearing(hear: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `hear` with each attention module and the keys and values that it is given within."""
    with holding(_hearing, hear):
        yield


def is_heard() -> bool:
    """Whether somebody listens; see `hearing`."""
    return _hearing.get() is not None


def use(model: PreTrainedModel) -> None:
    """Makes a model attend through here. Raises ModelError when its family does not use the interface."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ModelError(f"{type(model).__name__} does not use the attention interface of transformers")


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    before: Sequence[Pair | None] | None,
    causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor | None:
    """[tokens, heads, width] by one kernel for all documents, or None where there is none for these."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if before is None and softcap is None:
        found = on_gpu(q, k, v, spans, causal, scale, window or 0)
        if found is not None:
            return found
    if not takes(q, k, v, scale):
        return None
    if before is not None:
        k, v, spans = _with_rows_of(before, k, v, spans)
    return attention(q, k, v, spans, causal, scale, window or 0, softcap or 0.0)


def _with_rows_of(pairs: Sequence[Pair | None], k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Spans]:
    """Keys and values [rows, kv heads, width] with what precedes documents behind them, and the spans that see it."""
    places: dict[int, tuple[int, int]] = {id(None): (0, 0)}
    keys, values, end = [k], [v], k.shape[0]
    for pair in pairs:
        if pair is not None and id(pair) not in places:
            places[id(pair)] = end, end + pair[0].shape[1]
            end = places[id(pair)][1]
            keys.append(pair[0].transpose(0, 1))
            values.append(pair[1].transpose(0, 1))
    seen = tuple((*span[:3], *places[id(pair)]) for span, pair in zip(spans, pairs, strict=True))
    return torch.cat(keys), torch.cat(values), seen


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: Pair | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One document: [1, heads, tokens, width]; `before` is what precedes its keys and values."""
    reaches = before is None and (window is None or window >= query.shape[2])
    free = 0
    if before is not None:
        free = before[0].shape[1]
        key, value = torch.cat([before[0][None], key], 2), torch.cat([before[1][None], value], 2)
    if softcap is not None:
        mask = _window(query, key, causal, window, free)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return capped(query, key, value, mask, scale, softcap, dropout)
    mask = None if reaches else _window(query, key, causal, window, free)
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] <= _WIDE_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).to(dtype)


def _check_going_on(segments: Segments, before: Sequence[Pair | None] | None, window: int | None) -> None:
    longest = max(end - start + after - first for start, end, _, first, after in segments.spans)
    if before is not None or (window is not None and window < longest):
        raise ModelError("segments that go on from others have neither windows nor keys of an adapter before them")


def _gone_on_from(segments: Segments, key: Tensor, value: Tensor) -> list[Pair | None]:
    """Keys and values [kv heads, length, width] of the segment that each goes on from."""
    return [
        None if first == after else (key[0, :, first:after], value[0, :, first:after])
        for *_, first, after in segments.spans
    ]


def _preceded(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, before: Sequence[Pair | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of a batch with what precedes them, and a mask that lets every query look there."""
    keys, values, there = side_by_side(before, key)
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    if mask is None and there is None:
        return key, value, None
    rows, tokens, longest = query.shape[0], query.shape[2], keys.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, 1, key.shape[2] - longest, dtype=torch.bool, device=key.device)
    free = torch.ones(rows, longest, dtype=torch.bool, device=key.device) if there is None else there
    if mask.dtype != torch.bool:
        free = torch.zeros_like(free, dtype=mask.dtype).masked_fill(~free, torch.finfo(mask.dtype).min)
    shape = rows, 1, tokens
    return key, value, torch.cat([free[:, None, None].expand(*shape, -1), mask.expand(*shape, -1)], 3)


def _window(query: Tensor, key: Tensor, causal: bool, window: int | None, free: int = 0) -> Tensor | None:
    """True where a query may look: not ahead of itself, not further back than the window, and at the `free` first."""
    if not causal and window is None:
        return None
    ahead = key.shape[2] - query.shape[2]
    at = torch.arange(query.shape[2], device=query.device)[:, None] + ahead
    to = torch.arange(key.shape[2], device=query.device)[None, :]
    allowed = to <= at
    return allowed if window is None else allowed & ((to > at - window) | (to < free))
