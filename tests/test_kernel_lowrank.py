"""Maps side by side with low-rank changes: outputs and gradients of the written-out backward against autograd's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tunesmith.kernels import lowrank
from tunesmith.kernels.lowrank import Again, LowRank, Map, maps, plain_maps

TOKENS, INPUTS = 37, 96
# outputs and ranks of the changes of each map: q-k-v with grouped keys, one map with two adapters, one without any
LAYOUTS = {
    "qkv": [(96, (8,)), (32, (4,)), (32, (8,))],
    "one": [(64, (16,))],
    "two adapters": [(64, (4, 8)), (64, ())],
    "frozen": [(64, ())],
}


def made(layout: str, dtype: torch.dtype, trained: bool, bias: bool = False) -> tuple[list[Map], list[Tensor]]:
    """Maps with random weights and factors, and everything that has a gradient."""
    torch.manual_seed(1)
    held, leaves = [], []
    for outputs, ranks in LAYOUTS[layout]:
        weight = (torch.randn(outputs, INPUTS) / 10).to(dtype).requires_grad_(trained)
        offset = torch.randn(outputs).to(dtype).requires_grad_(trained) if bias else None
        changes = []
        for rank in ranks:
            a, b = (torch.randn(*shape) / 5 for shape in ((rank, INPUTS), (outputs, rank)))
            changes.append(LowRank(a.requires_grad_(), b.requires_grad_(), 0.7))
            leaves += [a, b]
        held.append(Map(weight, offset, tuple(changes)))
        leaves += [one for one in (weight, offset) if one is not None and trained]
    return held, leaves


def wide(held: list[Map]) -> tuple[list[Map], list[Tensor]]:
    """The same numbers in float64, as leaves of their own."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        found = tensor.detach().double().requires_grad_(tensor.requires_grad)
        leaves.append(found)
        return found

    copies = []
    for one in held:
        changes = tuple(LowRank(leaf(c.a), leaf(c.b), c.scale) for c in one.changes)
        weight = leaf(one.weight)
        copies.append(Map(weight, None if one.bias is None else leaf(one.bias), changes))
    return copies, [one for one in leaves if one.requires_grad]


def differentiated(call, x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a fixed random combination of it."""
    y = call(x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(leaf.grad for leaf in leaves)]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_those_of_autograd(layout: str, dtype: torch.dtype, trained: bool) -> None:
    held, leaves = made(layout, dtype, trained, bias=layout == "qkv")
    torch.manual_seed(3)
    start = torch.randn(TOKENS, INPUTS).to(dtype)
    exactly, exact_leaves = wide(held)
    exact = differentiated(partial(plain_maps, held=exactly), start.double().requires_grad_(), exact_leaves)
    ours = differentiated(partial(maps, held=held), start.clone().requires_grad_(), leaves)
    for leaf in leaves:
        leaf.grad = None
    plain = differentiated(partial(plain_maps, held=held), start.clone().requires_grad_(), leaves)
    for found, twin, wanted in zip(ours, plain, exact, strict=True):
        allowed = 1e-6 if dtype == torch.float32 else max(1e-3, 1.1 * distance(twin, wanted))
        assert distance(found, wanted) <= allowed


def test_an_input_made_again_gives_the_same_gradients_and_is_not_kept() -> None:
    held, leaves = made("qkv", torch.float32, trained=False)
    source = torch.randn(TOKENS, INPUTS, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        x = source.tanh()
        again = Again(torch.tanh, (source.detach(),))
        y = maps(x, held, again)
    assert kept.count(x.data_ptr()) == 1  # tanh keeps its own output; the maps do not
    y.sum().backward()
    made_again = [source.grad, *(leaf.grad for leaf in leaves)]
    source.grad = None
    for leaf in leaves:
        leaf.grad = None
    maps(source.tanh(), held).sum().backward()
    for found, wanted in zip(made_again, [source.grad, *(leaf.grad for leaf in leaves)], strict=True):
        assert torch.equal(found, wanted)


def test_frozen_weights_cost_no_gradient_and_keep_no_input() -> None:
    held, _ = made("frozen", torch.float32, trained=False)
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        maps(x, held)
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("layout", ["qkv", "two adapters"])
def test_factors_are_laid_out_once_while_nothing_changes_them(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as laid out each time, and changes between such spans are seen. Kills: a key without the scale,
    or that outlives the span."""
    counted = []
    plain = lowrank._ups
    monkeypatch.setattr(lowrank, "_ups", lambda *given: counted.append(1) or plain(*given))
    held, _ = made(layout, torch.float32, trained=False)
    held = [Map(one.weight, one.bias, tuple(map(as_parameters, one.changes))) for one in held]
    other = [Map(one.weight, one.bias, tuple(replace(c, scale=2.0) for c in one.changes)) for one in held]
    x = torch.randn(TOKENS, INPUTS)

    def found() -> list[Tensor]:
        made = [maps(x, both) for both in (held, other, held)]
        leaf = held[0].changes[0].b
        return [*(one.detach() for one in made), *torch.autograd.grad(sum(one.sum() for one in made), leaf)]

    apart = found()
    counted.clear()
    laid = lowrank.LaidOut()
    for _ in range(2):
        with laid.unchanging():
            assert all(map(torch.equal, found(), apart))
        assert len(counted) == 2
        counted.clear()
    with torch.no_grad():
        held[0].changes[0].b.mul_(3)
    with laid.unchanging():
        now = found()
    assert all(map(torch.equal, now, found()))
    assert not torch.equal(now[0], apart[0])


def as_parameters(change: LowRank) -> LowRank:
    return LowRank(torch.nn.Parameter(change.a.detach()), torch.nn.Parameter(change.b.detach()), change.scale)
