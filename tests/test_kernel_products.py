"""Products in bfloat16 against float64 and against their plain twins: every orientation, edge, and way to lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.core.switches import without
from tunesmith.kernels import products
from tunesmith.kernels.build import counted

BF16 = torch.bfloat16
on_tiles = pytest.mark.skipif(not products.fast(BF16), reason="no products of bfloat16 in this processor")

# rows, outputs of each map, inputs, rank of each map: whole blocks, edges on every side, maps that share a panel
SHAPES = [
    (96, (64, 32, 32), 64, 16),
    (33, (5, 7), 11, 3),
    (70, (100, 29), 650, 7),
    (17, (40,), 1300, 1),
    (1, (3,), 3, 2),
    (70, (37,), 2500, 3),  # a long sum, in passes: forward, and backward
    (70, (2500,), 37, 3),
]


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small products go to the kernel too; what a test does to the number of threads ends with it."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "FEWEST", 0)
    monkeypatch.setattr(products, "LEAST", 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def among_nans(*shape: int) -> Tensor:
    """A matrix whose rows lie apart, with NaN on all sides."""
    rows, columns = shape
    around = torch.full((rows + 2, columns + 13), float("nan"), dtype=BF16)
    around[1:-1, 5 : 5 + columns] = torch.randn(rows, columns)
    return around[1:-1, 5 : 5 + columns]


def copies(given: object) -> Any:
    """The same without the NaNs: torch 2.13's own product multiplies what lies beside such rows by 0."""
    if isinstance(given, Tensor):
        return given.contiguous()
    return None if given is None else [copies(one) for one in given]  # type: ignore[attr-defined]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def no_worse(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether a result is as near as the plain one; 1e-6 for results that are not rounded at all."""
    return error(found, exact) <= error(plain, exact) * 1.1 + 1e-6


@on_tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("second", ["none", "one", "dense", "diagonal"])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_products_of_several_weights_are_as_near_as_torchs(
    shape: tuple[int, tuple[int, ...], int, int], second: str, bias: bool
) -> None:
    """Kills: a second operand of the wrong map's columns, a bias added before the wrong panel, an edge not masked."""
    rows, outputs, inputs, rank = shape
    x, ws = among_nans(rows, inputs), [among_nans(n, inputs) for n in outputs]
    narrow = among_nans(rows, rank * len(outputs))
    widths = [rank if second == "diagonal" else rank * len(outputs)] * len(outputs)
    w2 = [among_nans(n, width) for n, width in zip(outputs, widths, strict=True)]
    extra = torch.randn(sum(outputs)).to(BF16) if bias else None
    given = {"none": (), "one": (narrow, torch.cat(w2)), "dense": (narrow, w2), "diagonal": (narrow, w2)}[second]

    exact = x.double() @ torch.cat(ws).double().T + (0 if extra is None else extra.double())
    if second != "none":
        wide = torch.block_diag(*w2) if second == "diagonal" else torch.cat(w2)
        exact = exact + narrow.double() @ wide.double().T
    found = products.nt(x, ws, *given, bias=extra)
    assert no_worse(found, products.plain_nt(*copies((x, ws, *given)), bias=extra), exact)


@on_tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("second", [False, True])
def test_backward_products_of_several_weights_are_as_near_as_torchs(
    shape: tuple[int, tuple[int, ...], int, int], second: bool
) -> None:
    """Kills: pieces whose rows do not fill steps packed as if they did, pairs of rows interleaved the wrong way."""
    rows, outputs, inputs, rank = shape
    dy, ws = among_nans(rows, sum(outputs)), [among_nans(n, inputs) for n in outputs]
    given = (among_nans(rows, rank * len(outputs)), [among_nans(rank, inputs) for _ in outputs]) if second else ()
    exact = dy.double() @ torch.cat(ws).double()
    if given:
        exact = exact + given[0].double() @ torch.cat(given[1]).double()
    assert no_worse(products.nn(dy, ws, *given), products.plain_nn(*copies((dy, ws, *given))), exact)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_a_result_can_go_where_the_caller_wants_it(dtype: torch.dtype, bias: bool) -> None:
    """Kills: `out` left as it was, or another tensor returned, by the kernel or by either twin."""
    x, w = torch.randn(40, 64).to(dtype), torch.randn(80, 64).to(dtype)
    shift = torch.randn(80).to(dtype) if bias else None
    for wanted, found in (
        (products.nt(x, w, bias=shift), products.nt(x, w, bias=shift, out=(y := x.new_empty(40, 80)))),
        (products.nn(x, w.T.contiguous()), products.nn(x, w.T.contiguous(), out=(y2 := x.new_empty(40, 80)))),
    ):
        assert found.data_ptr() in (y.data_ptr(), y2.data_ptr())
        torch.testing.assert_close(found, wanted)


@on_tiles
@pytest.mark.parametrize(("rows", "n", "k"), [(64, 16, 96), (37, 5, 300), (37, 300, 5), (1030, 40, 33), (2, 170, 190)])
@pytest.mark.parametrize("add", [False, True])
def test_gradients_of_weights_are_sums_in_float(rows: int, n: int, k: int, add: bool) -> None:
    """Kills: the narrow operand's turn forgotten, the second thousand rows written over the first, `out` scaled."""
    a, b = among_nans(rows, n), among_nans(rows, k)
    out = torch.randn(n, k + 3)[:, :k] if add else None
    exact = 0.5 * a.double().T @ b.double() + (0 if out is None else out.double())
    found = products.tn(a, b, out, 0.5)
    assert found.dtype == torch.float32
    assert error(found, exact) < 1e-6
    assert out is None or found is out


@on_tiles
def test_no_result_depends_on_the_number_of_threads() -> None:
    """Kills: partial sums of threads added up."""
    x, w, narrow, w2 = (torch.randn(*s).to(BF16) for s in ((200, 96), (160, 96), (200, 16), (160, 16)))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append((products.nt(x, w, narrow, w2), products.nn(x, w.T.contiguous()), products.tn(narrow, x)))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_where_gradients_are_asked_for_they_flow(dtype: torch.dtype) -> None:
    """Kills: the kernel called with inputs that want gradients, which it would lose."""
    x, w = torch.randn(40, 32).to(dtype).requires_grad_(), torch.randn(48, 32).to(dtype)
    products.nt(x, w).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.sum(0).expand(40, 32), rtol=2e-2, atol=2e-2)


def test_switched_off_and_in_float32_torch_computes_all() -> None:
    """Kills: the switch not asked, float32 rounded to bfloat16."""
    x, w = torch.randn(40, 32), torch.randn(48, 32)
    assert not products.fast(torch.float32)
    assert torch.equal(products.nt(x, w), x @ w.T)
    with without("products"):
        assert not products.fast(BF16)


@on_tiles
def test_weights_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    """Kills: shapes not compared before their addresses go to the kernel."""
    x, w = torch.randn(40, 32).to(BF16), torch.randn(48, 31).to(BF16)
    with pytest.raises(ValueError, match="do not fit 32 inputs"):
        products.nt(x, w)
    with pytest.raises(ValueError, match="do not fit 32 inputs"):
        products.nn(x, w)
    with pytest.raises(ValueError, match="do not make"):
        products.tn(x, x[:-1])


@on_tiles
def test_who_counts_work_hears_of_both_operands() -> None:
    """Kills: the second operand left out of the count."""
    x, w, narrow, w2 = (torch.randn(*s).to(BF16) for s in ((40, 96), (160, 96), (40, 16), (160, 16)))
    told: list[int] = []
    with counted(told.append, lambda numbers: None):
        products.nt(x, w, narrow, w2)
        products.tn(narrow, x)
    assert told == [2 * 40 * 160 * (96 + 16), 2 * 40 * 16 * 96]
