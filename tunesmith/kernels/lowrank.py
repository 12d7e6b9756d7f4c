"""Linear maps side by side, each with low-rank changes beside it, as one operation with its backward written out.

y = [W_1 x + s B_1 A_1 x | W_2 x + s B_2 A_2 x | ...]. What the backward keeps is x and the narrow A x, and not even x
where it can be made again from what is kept anyway. Weights that are frozen get no gradient, and cost none.
Hu et al. 2021, arXiv 2106.09685, equation 3; the gradients are those of its products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.core.context import holding
from tunesmith.kernels import products
from tunesmith.kernels.quantized import dense


@dataclass(frozen=True)
class LowRank:
    """A change s B A of one map: A [rank, inputs] and B [outputs, rank], in any dtype."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Map:
    """A linear map and the changes beside it: weight [outputs, inputs], as numbers or codes; bias [outputs] or None."""

    weight: Tensor
    bias: Tensor | None = None
    changes: tuple[LowRank, ...] = ()


@dataclass(frozen=True)
class Again:
    """How an input can be made again: `make(*kept)` has its values, without gradients."""

    make: Callable[..., Tensor]
    kept: tuple[Tensor, ...]


class LaidOut:
    """Factors that train, cast and laid out once for all passes within `unchanging`.

    What the last span had is laid out ahead of the first pass, in one piece of memory: made one by one in that pass,
    they would lie between its activations, and the larger ones of the next would not fit between them.
    """

    def __init__(self) -> None:
        # with the factors of each: an id says which tensor only as long as that is there
        self._known: dict[tuple[Any, ...], tuple[_Layout, Sequence[Tensor], Tensor]] = {}
        self._made: dict[tuple[Any, ...], _Laid] = {}
        self._room = torch.empty(0)

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Within, no factor changes."""
        sizes = {key: layout.numbers(factors) for key, (layout, factors, _) in self._known.items()}
        for dtype in {like.dtype for _, _, like in self._known.values()}:
            alike = {key: known for key, known in self._known.items() if known[2].dtype == dtype}
            like = next(iter(alike.values()))[2]
            self._room = like.new_empty(sum(sizes[key] for key in alike))
            self._made |= {key: self._make(*known) for key, known in alike.items()}
        self._known = {}
        try:
            with holding(_laid, self):
                yield
        finally:
            self._made, self._room = {}, torch.empty(0)

    def of(self, layout: _Layout, factors: Sequence[Tensor], x: Tensor) -> _Laid:
        """As `_laid_out` answers."""
        key = (x.dtype, layout.outputs, layout.changes, *map(id, factors))
        if key not in self._known:
            self._known[key] = layout, factors, x.new_empty(0)
        if key not in self._made:
            self._made[key] = self._make(layout, factors, x)
        return self._made[key]

    def _make(self, layout: _Layout, factors: Sequence[Tensor], like: Tensor) -> _Laid:
        take = partial(self._take, like)
        down = take(sum(layout.ranks), factors[0].shape[1])
        for part, a in zip(down.split(layout.ranks), factors[::2], strict=True):
            part.copy_(a.detach())
        return down, _ups(layout, [b.detach() for b in factors[1::2]], take)

    def _take(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """Zeros, [rows, columns]."""
        count = rows * columns
        if self._room.dtype != like.dtype or len(self._room) < count:
            return like.new_zeros(rows, columns)
        # not a view for autograd: what is written into the rest of the piece does not change this
        taken, self._room = self._room[:count].data, self._room[count:]
        return taken.zero_().view(rows, columns)


def maps(x: Tensor, held: Sequence[Map], again: Again | None = None) -> Tensor:
    """What maps make of x, side by side.

    Args:
        x: [tokens, inputs].
        held: the maps; all of x's inputs.
        again: makes x in the backward, so that it need not be kept.

    Returns:
        [tokens, sum of outputs], in the dtype of x, differentiable in x and in all weights, biases and factors.
    """
    changes = [(index, change) for index, one in enumerate(held) for change in one.changes]
    layout = _Layout(
        tuple(one.weight.shape[0] for one in held),
        tuple((index, change.a.shape[0], change.scale) for index, change in changes),
        again.make if again is not None else None,
    )
    tensors = [
        *(one.weight for one in held),
        *(one.bias for one in held),
        *(factor for _, change in changes for factor in (change.a, change.b)),
    ]
    y: Tensor = _Maps.apply(x, layout, again.kept if again is not None else (), *tensors)  # type: ignore[no-untyped-call]
    return y


def plain_maps(x: Tensor, held: Sequence[Map]) -> Tensor:
    """The plain twin of `maps`."""
    linear = torch.nn.functional.linear
    parts = []
    for one in held:
        y = linear(x, one.weight, one.bias)
        for change in one.changes:
            y = y + linear(linear(x, change.a.to(x.dtype)) * change.scale, change.b.to(x.dtype))
        parts.append(y)
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Layout:
    """What is no tensor: outputs of each map; map, rank and scale of each change; how to make x again."""

    outputs: tuple[int, ...]
    changes: tuple[tuple[int, int, float], ...]
    make: Callable[..., Tensor] | None

    @property
    def ranks(self) -> list[int]:
        return [rank for _, rank, _ in self.changes]

    def numbers(self, factors: Sequence[Tensor]) -> int:
        """How many there are in what `_laid_out` answers."""
        return sum(self.ranks) * (factors[0].shape[1] + sum(self.outputs))


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: _Layout, kept: tuple[Tensor, ...], *tensors: Any) -> Tensor:
        count = len(layout.outputs)
        weights, biases, factors = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        narrow = down = None
        ups = [torch.zeros(0)] * count
        if layout.changes:
            down, ups = _laid_out(layout, factors, x)
            narrow = products.nt(x, down)
        y = products.nt(
            x,
            [dense(weight) for weight in weights],
            narrow,
            ups if layout.changes else None,
            _joined(biases, layout.outputs),
        )
        wants_x = any(ctx.needs_input_grad[3:][:count]) or any(ctx.needs_input_grad[3 + 2 * count :])
        own = () if not wants_x else kept if layout.make is not None else (x,)
        ctx.layout, ctx.count, ctx.own = layout, count, len(own)
        ctx.like = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(*own, *weights, *([down, narrow, *ups] if layout.changes else []))
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layout, count, needs = ctx.layout, ctx.count, ctx.needs_input_grad
        saved = list(ctx.saved_tensors)
        own, weights, rest = saved[: ctx.own], saved[ctx.own : ctx.own + count], saved[ctx.own + count :]
        down, narrow, ups = (rest[0], rest[1], rest[2:]) if rest else (None, None, [])
        dys = dy.split(layout.outputs, -1)
        thin = products.nn(dy, ups) if layout.changes else None  # the gradient of A x, of all changes
        dx = products.nn(dy, [dense(weight) for weight in weights], thin, down) if needs[0] else None
        x: Any = (layout.make(*own) if layout.make is not None else own[0]) if own else None
        like = ctx.like
        grads: list[Tensor | None] = [None] * len(like)
        for index in range(count):
            if needs[3 + index]:
                grads[index] = products.tn(dys[index], x).to(like[index])
            if needs[3 + count + index]:
                grads[count + index] = dys[index].sum(0, dtype=torch.float32).to(like[count + index])
        if thin is not None and narrow is not None and any(needs[3 + 2 * count :]):
            factors = _of_factors(layout, dys, thin, narrow, x)
            grads[2 * count :] = [grad.to(dtype) for grad, dtype in zip(factors, like[2 * count :], strict=True)]
        return dx, None, None, *grads


def _of_factors(layout: _Layout, dys: Sequence[Tensor], thin: Tensor, narrow: Tensor, x: Tensor) -> Iterator[Tensor]:
    """The gradients of A and B of each change, float32."""
    parts = zip(products.tn(thin, x).split(layout.ranks), narrow.split(layout.ranks, -1), layout.changes, strict=True)
    for of_a, inner, (index, _, scale) in parts:
        yield of_a
        yield products.tn(dys[index], inner, scale=scale)


_Laid = tuple[Tensor, list[Tensor]]
_laid: ContextVar[LaidOut | None] = ContextVar("laid out", default=None)


def _laid_out(layout: _Layout, factors: Sequence[Tensor], x: Tensor) -> _Laid:
    """All A, one below the other, and s B of each map as `_ups` has it, in the dtype of x."""
    held = _laid.get()
    if held is not None and all(isinstance(factor, torch.nn.Parameter) for factor in factors):
        return held.of(replace(layout, make=None), factors, x)
    return torch.cat([a.to(x.dtype) for a in factors[::2]]), _ups(layout, factors[1::2], x.new_zeros)


def _ups(layout: _Layout, factors: Sequence[Tensor], zeros: Callable[[int, int], Tensor]) -> list[Tensor]:
    """s B of each map, its changes side by side and zeros for those of other maps: [outputs, all ranks]."""
    found, start = zeros(sum(layout.outputs), sum(layout.ranks)).split(layout.outputs), 0
    for (index, rank, scale), b in zip(layout.changes, factors, strict=True):
        torch.mul(b, scale, out=found[index][:, start : start + rank])
        start += rank
    return list(found)


def _joined(biases: Sequence[Tensor | None], outputs: Sequence[int]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    some = next(bias for bias in biases if bias is not None)
    return torch.cat([some.new_zeros(n) if b is None else b for b, n in zip(biases, outputs, strict=True)])
