"""Attention inside documents by our own kernel: as exact as its plain twin, whatever the documents and heads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from tunesmith.core.switches import without
from tunesmith.kernels import attention as kernel
from tunesmith.kernels.attention import Spans, attention, plain_attention, takes
from tunesmith.kernels.build import counted, library
from tunesmith.models.attention import attend
from tunesmith.models.route import Segments

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
EXACT = 1e-6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["tiles", "floats"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """in bfloat16, where the processor has products of it, and in floats."""
    monkeypatch.setattr(kernel, "TILES", request.param)
    return bool(request.param)


def end_to_end(*lengths: int) -> Spans:
    ends = accumulate(lengths)
    return tuple((end - length, end, end - length, 0, 0) for length, end in zip(lengths, ends, strict=True))


def drawn(queries: int, keys: int, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    """q, k, v and a gradient, in numbers that bfloat16 holds."""
    draw = torch.Generator().manual_seed(0)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    return [torch.randn(*shape, width, generator=draw).bfloat16().float() for shape in shapes]


def run(function: object, inputs: list[Tensor], dtype: torch.dtype, *how: object) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    q, k, v, pull = (x.to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = function(*leaves, *how)  # type: ignore[operator]
    return [o.detach(), *torch.autograd.grad(o, leaves, pull)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]


SHARED = ((0, 70, 0, 0, 0), (70, 100, 70, 0, 70), (100, 195, 100, 0, 70))
APART = ((0, 70, 90, 3, 48), (80, 113, 10, 160, 195), (120, 180, 60, 3, 48))
CASES: dict[str, tuple[Spans, tuple[int, int, int], bool, int, float]] = {
    "documents of many lengths": (end_to_end(30, 1, 136, 64, 300, 33), (6, 2, 64), True, 0, 0.0),
    "seen from both sides": (end_to_end(30, 1, 136, 64, 97), (4, 4, 32), False, 0, 0.0),
    "odd width": (end_to_end(75, 40), (4, 2, 20), True, 0, 0.0),
    "wide heads": (end_to_end(75, 40), (2, 1, 256), True, 0, 0.0),
    "narrow window": (end_to_end(136, 5, 64), (4, 2, 16), True, 7, 0.0),
    "window over blocks": (end_to_end(500, 90), (2, 2, 16), True, 100, 0.0),
    "a beginning of several": (SHARED, (4, 2, 32), True, 0, 0.0),
    "a beginning of several, window": (SHARED, (4, 2, 32), True, 20, 0.0),
    "a beginning of several, both sides": (SHARED, (4, 2, 32), False, 0, 0.0),
    "keys elsewhere": (APART, (4, 1, 32), True, 0, 0.0),
    "a long document": (end_to_end(1300), (2, 1, 16), True, 0, 0.0),
    "a long document, window": (end_to_end(1300), (2, 1, 16), True, 200, 0.0),
    "a long document, both sides": (end_to_end(1100), (2, 1, 16), False, 0, 0.0),
    "capped": (end_to_end(30, 1, 136, 64, 97), (4, 2, 32), True, 0, 1.5),
    "capped, window": (end_to_end(136, 5, 64), (4, 2, 16), True, 7, 1.5),
    "capped, a long document": (end_to_end(1300), (2, 1, 16), True, 0, 1.5),
    "capped, a beginning of several": (SHARED, (4, 2, 32), False, 0, 1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_attention_and_its_gradients_are_those_of_float64(case: str) -> None:
    """Kills: a mask one key off; a last block that is not cut; parts of a long document that overwrite each other;
    gradients of a shared beginning that only its last document gives; a cap before the scale, or without its slope."""
    spans, (heads, kv_heads, width), causal, window, cap = CASES[case]
    rows = max(end for _, end, *_ in spans)
    inputs = drawn(rows, max(rows, 200), heads, kv_heads, width)
    how = spans, causal, 0.2, window, cap
    assert takes(*inputs[:3], 0.2)
    wanted = run(plain_attention, inputs, torch.float64, *how)
    for error in errors(run(attention, inputs, torch.float32, *how), wanted):
        assert error < EXACT


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_attention_and_its_gradients_are_rounded_once(case: str, tiles: bool) -> None:
    """Nearer to float64 than the plain twin in bfloat16, and as near as can be. Kills: on tiles, weights or gradients
    of scores without their rest, and deltas of a rounded result; in floats, numbers widened wrongly."""
    spans, (heads, kv_heads, width), causal, window, cap = CASES[case]
    rows = max(end for _, end, *_ in spans)
    inputs = drawn(rows, max(rows, 200), heads, kv_heads, width)
    how = spans, causal, 0.2, window, cap
    wanted = run(plain_attention, inputs, torch.float64, *how)
    found = errors(run(attention, inputs, torch.bfloat16, *how), wanted)
    twins = errors(run(plain_attention, inputs, torch.bfloat16, *how), wanted)
    rounded = errors([x.bfloat16() for x in wanted], wanted)
    assert all(one < other for one, other in zip(found, twins, strict=True))
    assert all(one <= 1.03 * other for one, other in zip(found, rounded, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_to_the_bit_for_any_number_of_threads(dtype: torch.dtype, tiles: bool) -> None:
    """Kills: gradients of a shared beginning summed as documents come."""
    spans = (*SHARED, *((195 + 20 * i, 215 + 20 * i, 195 + 20 * i, 10, 60) for i in range(10)))
    inputs = drawn(395, 395, 4, 2, 32)
    one = run(attention, inputs, dtype, spans)
    torch.set_num_threads(2)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(run(attention, inputs, dtype, spans), one, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_with_strides_are_read_where_they_lie(dtype: torch.dtype, tiles: bool) -> None:
    """Kills: rows of a product of q, k and v taken for rows of q."""
    qkv = torch.randn(60, 8 * 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    q, k, v = qkv.unflatten(1, (8, 16)).split([4, 2, 2], 1)
    spans, pull = end_to_end(40, 20), torch.randn(4, 60, 16).to(dtype).transpose(0, 1)
    turned = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v))
    wanted = [x.contiguous() for x in (q, k, v)]
    results = [attention(*parts, spans) for parts in ((q, k, v), turned, wanted)]
    grads = [torch.autograd.grad(o, qkv, pull, retain_graph=True)[0] for o in results]
    assert all(torch.equal(o, results[2]) for o in results)
    assert all(torch.equal(grad, grads[2]) for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_in_no_span_gives_zeros_and_gets_none_but_zeros(dtype: torch.dtype, tiles: bool) -> None:
    """Kills: memory that was never written."""
    inputs = drawn(100, 120, 2, 1, 32)
    o, dq, dk, dv = run(attention, inputs, dtype, ((10, 40, 30, 100, 105), (50, 50, 0, 0, 0), (60, 61, 80, 0, 0)))
    rest = [*range(10), *range(40, 60), *range(61, 100)]
    assert not o[rest].any()
    assert not dq[rest].any()
    rest = [*range(30), *range(60, 80), *range(81, 100), *range(105, 120)]
    assert not dk[rest].any()
    assert not dv[rest].any()
    assert o[10:40].all()
    assert dv[100:105].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_are_no_problem_and_what_is_no_number_stays_in_its_document(
    dtype: torch.dtype, tiles: bool
) -> None:
    """Kills: sums without the largest score taken off; weights that add up to one only as far as a logarithm is exact;
    rows read beyond the end of a document; NaN hidden by a max."""
    inputs = drawn(80, 80, 2, 2, 16)
    inputs[0] *= 64
    inputs[1][40] = inputs[2][41] = inputs[3][42] = float("nan")
    spans = end_to_end(40, 40)
    found = run(attention, inputs, dtype, spans)
    wanted = run(plain_attention, [x[:40] for x in inputs], torch.float64, spans[:1], True, 0.25)
    for error in errors([x[:40] for x in found], wanted):
        assert error < (1e-5 if dtype == torch.float32 else 0.02)
    assert all(x[40:].isnan().any() for x in found)
    assert found[0][41:].isnan().all()


WRONG: list[Spans] = [
    ((0, 11, 0, 0, 0),),
    ((-1, 4, 0, 0, 0),),
    ((0, 5, 8, 0, 0),),
    ((0, 5, 0, 4, 11),),
    ((0, 5, 0, 4, 3),),
    ((0, 5, 0, 0, 0), (4, 8, 4, 0, 0)),
]


@pytest.mark.parametrize("spans", WRONG)
def test_spans_that_leave_their_rows_or_overlap_are_refused(spans: Spans) -> None:
    """Kills: memory of others, read or written."""
    with pytest.raises(ValueError, match="spans"):
        attention(*drawn(10, 10, 2, 1, 8)[:3], spans)


def test_a_window_needs_causal_attention() -> None:
    with pytest.raises(ValueError, match="window"):
        attention(*drawn(10, 10, 2, 1, 8)[:3], end_to_end(10), causal=False, window=3)


def test_the_backward_keeps_its_inputs_and_one_float_a_query_and_head() -> None:
    """Kills: weights, or the result, that are kept."""
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage().nbytes())
        return x

    inputs = [x.bfloat16().requires_grad_() for x in drawn(100, 100, 4, 2, 16)[:3]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*inputs, end_to_end(60, 40))
    assert sum(kept) == 2 * 100 * 16 * (4 + 2 + 2) + 4 * 100 * 4


def test_work_is_counted_as_torch_counts_its_own_attention() -> None:
    inputs, spans = drawn(60, 60, 4, 2, 16), end_to_end(60)
    found: list[int] = []
    with counted(found.append, lambda numbers: None):
        run(attention, inputs, torch.float32, spans)
    shape, narrow = (1, 4, 60, 16), (1, 2, 60, 16)
    backward = sdpa_backward_flop_count(shape, shape, narrow, narrow)
    assert found == [sdpa_flop_count(shape, shape, shape), backward]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
def test_a_model_attends_the_same_with_and_without_the_kernel(dtype: torch.dtype, window: int | None) -> None:
    """Kills: spans of the wrong documents; heads and tokens confused."""
    module = nn.Module()
    module.is_causal = True
    inputs = [x.transpose(0, 1)[None].to(dtype).requires_grad_() for x in drawn(60, 60, 4, 2, 16)[:3]]
    results = []
    for off in ((), ("attention",)):
        with without(*off), Segments((33, 7, 20), () if window else (None, 0, 0)).enter():
            o, _ = attend(module, *inputs, None, scaling=0.3, sliding_window=window)
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    assert type(results[0][0].grad_fn).__name__ != type(results[1][0].grad_fn).__name__
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert errors([one.detach()], [other.detach().double()])[0] < (EXACT if dtype == torch.float32 else 6e-3)
