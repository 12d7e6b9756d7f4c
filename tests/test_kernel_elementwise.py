"""Norms, rotary positions, gated activations and cross-entropy: kernels against plain twins, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from tunesmith.core.switches import without
from tunesmith.kernels import elementwise as ours
from tunesmith.kernels.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler here")

DTYPES = [torch.float32, torch.bfloat16]
ROWS = 37
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Case:
    """A function, its plain twin, and its differentiable inputs; `fixed` inputs have no gradient."""

    call: Callable[..., object]
    plain: Callable[..., object]
    inputs: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()


def norm(dtype: torch.dtype, width: int, offset: float, weight_dtype: torch.dtype | None = None) -> Case:
    weight = (torch.rand(width) + 0.5 - offset).to(weight_dtype or dtype)
    inputs = (torch.randn(ROWS, width) * 3).to(dtype), weight
    settings = {"eps": 1e-5, "offset": offset}
    return Case(partial(ours.rms_norm, **settings), partial(ours.plain_rms_norm, **settings), inputs)


def add_norm(dtype: torch.dtype, width: int, offset: float) -> Case:
    settings = {"eps": 1e-5, "offset": offset}
    inputs = *(torch.randn(ROWS, width).to(dtype) for _ in range(2)), (torch.rand(width) + 0.5).to(dtype)
    return Case(partial(ours.add_rms_norm, **settings), partial(ours.plain_add_rms_norm, **settings), inputs)


def rope(dtype: torch.dtype, width: int, turned: int, table_dtype: torch.dtype | None = None) -> Case:
    angles = torch.randn(ROWS, turned)  # the halves of a real table are equal: here a mix-up of them shows
    tables = tuple(table.to(table_dtype or dtype) for table in (angles.cos(), angles.sin()))
    settings = {"heads": HEADS, "kv_heads": KV_HEADS}
    inputs = (torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * width).to(dtype),)
    return Case(partial(ours.split_rope, **settings), partial(ours.plain_split_rope, **settings), inputs, tables)


def heads(dtype: torch.dtype, width: int, offset: float, weight_dtype: torch.dtype | None = None) -> Case:
    weights = tuple((torch.rand(width) + 0.5 - offset).to(weight_dtype or dtype) for _ in range(2))
    inputs = (torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * width) * 3).to(dtype), *weights
    settings = {"heads": HEADS, "kv_heads": KV_HEADS, "eps": 1e-5, "offset": offset}
    return Case(partial(ours.norm_heads, **settings), partial(ours.plain_norm_heads, **settings), inputs)


def gate(dtype: torch.dtype, width: int, kind: str) -> Case:
    settings = {"kind": kind}
    inputs = ((torch.randn(ROWS, 2 * width) * 3).to(dtype),)
    return Case(partial(ours.gated, **settings), partial(ours.plain_gated, **settings), inputs)


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "norm": partial(norm, width=576, offset=0.0),
    "norm, gemma": partial(norm, width=128, offset=1.0),
    "norm, odd width": partial(norm, width=43, offset=0.0),
    "norm, float32 weight": partial(norm, width=64, offset=0.0, weight_dtype=torch.float32),
    "norm, bfloat16 weight": partial(norm, width=64, offset=0.0, weight_dtype=torch.bfloat16),
    "sum and norm": partial(add_norm, width=576, offset=0.0),
    "sum and norm, gemma, odd width": partial(add_norm, width=21, offset=1.0),
    "heads": partial(heads, width=64, offset=0.0),
    "heads, gemma, odd width": partial(heads, width=21, offset=1.0),
    "heads, float32 weights": partial(heads, width=32, offset=0.0, weight_dtype=torch.float32),
    "rope": partial(rope, width=64, turned=64),
    "rope, narrow heads": partial(rope, width=12, turned=12),
    "rope, a part of the head": partial(rope, width=80, turned=32),
    "rope, float32 tables": partial(rope, width=64, turned=64, table_dtype=torch.float32),
    "silu": partial(gate, width=1536, kind="silu"),
    "gelu by tanh": partial(gate, width=96, kind="gelu_tanh"),
    "gelu": partial(gate, width=96, kind="gelu"),
    "silu, odd width": partial(gate, width=29, kind="silu"),
}


@pytest.fixture(params=CASES)
def build(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Case]:
    torch.manual_seed(3)
    return CASES[request.param]


def results(call: Callable[..., object], inputs: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a fixed random combination of them, each beside what it is of."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = call(*leaves, *fixed)
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(4)
    sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in found).backward()  # type: ignore[union-attr]
    return [one.detach() for one in found] + [leaf.grad for leaf in leaves]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The relative distance of each result, over all its elements."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def test_in_float32_outputs_and_gradients_are_those_of_the_plain_twin_in_float64(build):
    """Kills: the mean left out of a norm's backward, a sine's sign, the wrong half of a table, a factor of a gelu."""
    case = build(torch.float32)
    exact = results(case.plain, wide(case.inputs), wide(case.fixed))
    found = results(case.call, case.inputs, case.fixed)
    bounds = [1e-6 if result.dtype == torch.float32 else 2**-8 for result in found]  # a weight may be in bfloat16
    assert all(error < bound for error, bound in zip(errors(found, exact), bounds, strict=True))


def test_in_bfloat16_no_result_is_further_from_float64_than_the_plain_twins(build):
    """Kills: an intermediate result rounded, a sum kept in bfloat16, rounding towards zero."""
    case = build(torch.bfloat16)
    exact = results(case.plain, wide(case.inputs), wide(case.fixed))
    found = errors(results(case.call, case.inputs, case.fixed), exact)
    plain = errors(results(case.plain, case.inputs, case.fixed), exact)
    assert all(a <= 1.1 * b + 1e-9 for a, b in zip(found, plain, strict=True)), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(build, dtype):
    """Kills: a weight's gradient summed by thread and not by block of rows."""
    case = build(dtype)
    held = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(case.call, case.inputs, case.fixed))
    finally:
        torch.set_num_threads(held)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_inputs_and_gradients_need_not_be_contiguous(build):
    """Kills: a stride taken for the width, in the forward or in the backward."""
    case = build(torch.float32)
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in case.inputs]
    assert not strided[0].is_contiguous()
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
    found = case.call(*leaves, *case.fixed)
    outputs = [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]
    again = case.call(*strided, *case.fixed)
    for a, b in zip(outputs, [again] if isinstance(again, Tensor) else again, strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)
    grads = [torch.randn_like(o) for o in outputs]
    dense = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    apart = [torch.stack([g, g + 1], -1)[..., 0] for g in grads]
    for a, b in zip(dense, torch.autograd.grad(outputs, leaves, apart), strict=True):
        assert torch.equal(a, b)


def test_no_rows_are_no_error(build):
    """Kills: a division by the number of rows."""
    case = build(torch.float32)
    first, *rest = case.inputs
    rows = [t[:0] if len(t) == ROWS else t for t in (first, *rest, *case.fixed)]
    for result in results(case.call, rows[: len(case.inputs)], rows[len(case.inputs) :])[:1]:
        assert len(result) == 0


def test_what_the_kernels_cannot_take_goes_through_the_plain_twin(build, monkeypatch):
    """Kills: the dtype, the switch or a tracer not asked about."""
    case = build(torch.float32)
    monkeypatch.setattr(ours, "kernels", None)  # a kernel that is called is an error
    results(case.call, wide(case.inputs), wide(case.fixed))
    case.call(*(t.to("meta") for t in (*case.inputs, *case.fixed)))
    with without("elementwise"):
        results(case.call, case.inputs, case.fixed)


def test_only_the_sum_of_a_sum_and_norm_may_be_used():
    """Kills: a missing gradient taken for one of zeros that has to exist."""
    case = add_norm(torch.float32, 32, 0.0)
    x, r, weight = (t.clone().requires_grad_() for t in case.inputs)
    ours.add_rms_norm(x, r, weight, 1e-5)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(r.grad, torch.ones_like(r))


@pytest.mark.parametrize("kind", ours.KINDS)
def test_activations_are_right_to_a_few_units_in_the_last_place_where_they_count(kind):
    """Kills: a digit of a polynomial, an overflow of the exponential."""
    x = torch.cat([torch.linspace(-30, 30, 40001), torch.tensor([-1e30, -1e9, -200.0, 0.0, 200.0, 1e9, 1e30])])
    gu = torch.stack([x, torch.ones_like(x)], -1)
    found = ours.gated(gu, kind)[:, 0].double()
    exact = ours.plain_gated(gu.double(), kind)[:, 0]
    assert ((found - exact).abs() <= 5e-7 * exact.abs() + 2e-8).all()


@pytest.mark.parametrize("kind", ours.KINDS)
def test_not_a_number_stays_one(kind):
    """Kills: a comparison that takes NaN for a number, a rounding that makes it infinite."""
    gu = torch.full((2, 8), float("nan"), dtype=torch.bfloat16)
    assert ours.gated(gu, kind).isnan().all()
    assert ours.rms_norm(gu, torch.ones(8), 1e-5).isnan().all()


def test_the_largest_float_rounds_to_infinity_and_halves_to_even_in_bfloat16():
    """Kills: rounding by cutting off."""
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1.0 - 2**-8, 3.3895e38, 3.4e38])
    gu = torch.stack([torch.full_like(ties, 100.0), torch.ones_like(ties)], -1)
    table = torch.stack([ties, ties], -1)
    turned = ours.split_rope(torch.ones(6, 6).bfloat16(), table, torch.zeros_like(table), 1, 1)[0]
    assert torch.equal(turned[:, 0, 0], ties.bfloat16())
    assert torch.isfinite(ours.gated(gu, "silu")).all()


SHAPES = {"as it is": (1.0, None), "scaled": (0.3, None), "capped": (1.0, 5.0), "scaled and capped": (2.0, 30.0)}


@pytest.mark.parametrize("width", [1000, 37, 5], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_and_its_gradient_are_those_of_the_plain_twin(shape, width, dtype):
    """Kills: the onehot left out or beside its place, a factor of the cap or scale, padding counted in the sum."""
    torch.manual_seed(5)
    scale, cap = SHAPES[shape]
    logits, targets = (torch.randn(ROWS, width) * 4).to(dtype), torch.randint(0, width, (ROWS,))
    targets[:2] = torch.tensor([0, width - 1])
    exact, plain, found = logits.double(), logits.clone(), logits.clone()
    exact_losses = ours.plain_cross_entropy_(exact, targets, scale, cap)
    plain_losses = ours.plain_cross_entropy_(plain, targets, scale, cap)
    losses = ours.cross_entropy_(found, targets, scale, cap)
    assert losses.dtype == torch.float32
    got, bound = errors((losses, found), (exact_losses, exact)), errors((plain_losses, plain), (exact_losses, exact))
    assert got[0] < 1e-6
    assert got[1] < (1e-6 if dtype == torch.float32 else 1.1 * bound[1])


def test_the_twins_gradient_of_cross_entropy_is_autograds():
    """Kills: an error that kernel and twin share."""
    torch.manual_seed(6)
    logits, targets = torch.randn(5, 11, dtype=torch.float64, requires_grad=True), torch.randint(0, 11, (5,))
    shaped = 2.0 * torch.tanh(logits * 0.7 / 2.0)
    losses = torch.nn.functional.cross_entropy(shaped, targets, reduction="none")
    (wanted,) = torch.autograd.grad(losses.sum(), logits)
    found = logits.detach().clone()
    torch.testing.assert_close(ours.plain_cross_entropy_(found, targets, 0.7, 2.0), losses.detach())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_leaves_logits_whose_gradient_nobody_wants_and_takes_large_ones(dtype):
    """Kills: an overflow where the largest logit is not taken off first, a gradient made for nothing."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]]).to(dtype)
    before, targets = logits.clone(), torch.tensor([0, 1])
    assert torch.equal(ours.cross_entropy_(logits, targets, gradient=False), torch.zeros(2))
    assert torch.equal(logits, before)
    ours.cross_entropy_(logits, targets)
    assert torch.equal(logits, torch.zeros_like(logits))


def test_cross_entropy_of_a_masked_logit_is_finite_and_of_not_a_number_is_not():
    """Kills: minus infinity times zero, NaN skipped by the search for the largest."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0], [0.0, float("nan"), 1.0]])
    losses = ours.cross_entropy_(logits, torch.tensor([0, 0]))
    assert torch.isfinite(losses[0])
    assert logits[0, 1] == 0
    assert losses[1].isnan()
    assert logits[1].isnan().all()


@pytest.mark.parametrize("target", [-100, 3])
def test_a_target_beyond_the_vocabulary_is_refused(target):
    """Kills: memory read that is not the row's."""
    with pytest.raises(IndexError, match="targets"):
        ours.cross_entropy_(torch.zeros(2, 3), torch.tensor([0, target]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_does_not_depend_on_the_number_of_threads(dtype):
    """Kills: threads that share the room of one."""
    torch.manual_seed(7)
    rows, width = 200, 20001  # long enough that threads do run at once
    logits, targets = (torch.randn(rows, width) * 4).to(dtype), torch.randint(0, width, (rows,))
    held, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            here = logits.clone()
            found.append((ours.cross_entropy_(here, targets), here))
    finally:
        torch.set_num_threads(held)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
