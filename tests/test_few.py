"""Products of few rows: the kernels are their plain twins, whatever the shape, and a row is what it is alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.kernels import few

SHAPES = [(1, 100, (13,)), (3, 64, (8, 7)), (4, 33, (5, 4, 1)), (9, 576, (20,)), (23, 31, (6, 6))]
DTYPES = [torch.float32, torch.bfloat16]


def near(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """As near to what is exact as float32 is, or as the plain twin in bfloat16."""
    bound = 1e-6 * float(exact.norm()) if found.dtype == torch.float32 else 1.1 * float((plain.double() - exact).norm())
    assert float((found.double() - exact).norm()) <= bound + 1e-9


@pytest.mark.parametrize(("rows", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5, 40])
def test_a_product_of_few_rows_is_the_product(
    rows: int, width: int, outputs: tuple[int, ...], dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: ends of rows left out; a block's outputs in another block's place; a bias added twice."""
    monkeypatch.setitem(few.MOST, dtype, 99)
    draw = torch.Generator().manual_seed(3)
    x, x2 = (torch.randn(rows, size, generator=draw).to(dtype) for size in (width, rank))
    ws, w2s = ([torch.randn(n, size, generator=draw).to(dtype) for n in outputs] for size in (width, rank))
    biases = [torch.randn(n, generator=draw).to(dtype) for n in outputs]
    given = (x, ws, x2, w2s, biases) if rank else (x, ws, None, [], biases)
    exact = torch.cat([(x.double() @ w.double().T) + (x2.double() @ w2.double().T) + bias
                       for w, w2, bias in zip(ws, w2s, biases, strict=True)], 1)  # fmt: skip
    found = few.nt(*given)
    near(found, few.plain_nt(*given), exact)
    alone = torch.cat([few.nt(x[[row]], ws, x2[[row]] if rank else None, given[3], biases) for row in range(rows)])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outputs"), [(64, 48), (33, 7)])
def test_each_row_gets_the_change_of_its_group(dtype: torch.dtype, width: int, outputs: int) -> None:
    """Kills: a neighbour's factors; a change for a group without one; rows beside each other taken for one group."""
    draw = torch.Generator().manual_seed(4)
    ranks = [3, 0, 9, 4]
    pairs = [
        (torch.randn(r, width, generator=draw).to(dtype), torch.randn(r, outputs, generator=draw).to(dtype))
        if r else None for r in ranks
    ]  # fmt: skip
    factors = few.Factors(pairs)
    groups = torch.tensor([0, 0, 0, 0, 2, 1, 0, 3, 3, 3, 3, 3, 2, 2], dtype=torch.int32)
    x = torch.randn(len(groups), width, generator=draw).to(dtype)
    start = torch.randn(len(groups), outputs + 5, generator=draw).to(dtype)
    found, plain = start.clone(), start.clone()
    few.changes(found[:, 2:-3], x, factors, groups)
    few.plain_changes(plain[:, 2:-3], x, factors, groups)
    exact = start.double()
    for row, group in enumerate(groups.tolist()):
        pair = pairs[group]
        if pair is not None:
            exact[row, 2:-3] += x[row].double() @ pair[0].double().T @ pair[1].double()
    near(found, plain, exact)
    assert torch.equal(found[:, :2], start[:, :2])
    assert torch.equal(found[:, -3:], start[:, -3:])
    for row in range(len(groups)):
        alone = start[[row]]
        few.changes(alone[:, 2:-3], x[[row]], factors, groups[[row]])
        assert torch.equal(alone[0], found[row])
