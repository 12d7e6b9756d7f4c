"""Products with weights laid out anew are those with the weights as they lay."""

from __future__ import annotations

import pytest
import torch

from tunesmith.core.switches import without
from tunesmith.kernels.packed import Arena, Packed, can_tile, plain, tiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 32, 45])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_that_of_the_weights_as_they_lay(dtype: torch.dtype, rows: int, biased: bool) -> None:
    """Kills: weights in another order than their biases; a layout that serves one number of rows alone."""
    draw = torch.Generator().manual_seed(5)
    ws = [torch.randn(n, 40, generator=draw).to(dtype) for n in (24, 8, 8)]
    biases = [torch.randn(len(w), generator=draw).to(dtype) for w in ws] if biased else []
    x = torch.randn(rows, 40, generator=draw).to(dtype)
    packed, bias = Packed(ws, biases), torch.cat(biases) if biased else None
    exact = plain(x.double(), [w.double() for w in ws], None if bias is None else bias.double())
    twin = plain(x, ws, bias)
    bound = 1e-6 * float(exact.norm()) if dtype == torch.float32 else 1.1 * float((twin.double() - exact).norm())
    assert float((packed(x).double() - exact).norm()) <= bound
    with without("products"):
        assert Packed(ws, biases).held is None
        assert torch.equal(Packed(ws, biases)(x), twin)


@pytest.mark.skipif(not can_tile(torch.bfloat16), reason="no tiles")
@pytest.mark.parametrize("rows", [1, 16, 17, 32, 45])
@pytest.mark.parametrize(("width", "outputs"), [(40, 33), (64, 96), (7, 5)])
def test_a_product_by_tiles_is_that_of_the_weights_as_they_lay(rows: int, width: int, outputs: int) -> None:
    """Kills: a second weight over the first one's end; the last rows of a weight, or of x, left out."""
    draw = torch.Generator().manual_seed(6)
    ws = [torch.randn(outputs, width, generator=draw).bfloat16() for _ in range(2)]
    bias, x = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((outputs,), (rows, width)))
    arena = Arena([(outputs, width)] * 2)
    laid = [arena.put(w) for w in ws]
    for w, one in zip(ws, laid, strict=True):
        exact, twin = x.double() @ w.double().T + bias.double(), plain(x, [w], bias)
        assert float((tiled(x, one, outputs, bias).double() - exact).norm()) <= 1.1 * float((twin - exact).norm())
