"""A frozen matrix that is held as codes and is a tensor all the same.

The one idea: it stands where the weight stood, under its name, with its shape and dtype. Whatever is computed from it
is computed from its numbers, made anew for that operation; linear maps keep the codes for their backward, not the
numbers. Nothing can be written into it, and a copy of it is an ordinary tensor. The codes are in `codes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from tunesmith.kernels import codes, products
from tunesmith.kernels.build import expanded

Kind = Literal["bf16", "int8", "nf4"]
_FORMATS: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[..., Tensor]]] = {
    "bf16": (lambda x: {"codes": x.bfloat16()}, lambda parts, shape, dtype: parts["codes"].to(dtype)),
    "int8": (codes.to_int8, codes.from_int8),
    "nf4": (codes.to_nf4, codes.from_nf4),
}
aten = torch.ops.aten


class Quantized(Tensor):
    """A matrix as codes.

    Attributes:
        parts: codes and scales by name, as `codes.to_nf4` and `codes.to_int8` answer them.
        kind: of codes.
    """

    parts: dict[str, Tensor]
    kind: Kind

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], kind: Kind, shape: torch.Size, dtype: torch.dtype) -> Quantized:
        found: Quantized = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=parts["codes"].device, requires_grad=False
        )
        found.parts, found.kind = parts, kind
        return found

    def __init__(self, *_: Any) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Quantized({self.kind}, {list(self.shape)}, {self.dtype})"

    @property
    def held_bytes(self) -> int:
        """What codes and scales take."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def dense(self) -> Tensor:
        """Its numbers, an ordinary tensor."""
        expanded(self.numel())
        return _FORMATS[self.kind][1](self.parts, self.shape, self.dtype)

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """The same with other parts: elsewhere, or without data."""
        return Quantized({name: change(part) for name, part in self.parts.items()}, self.kind, self.shape, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.addmm and isinstance(args[2], Quantized) and not kwargs:  # as GPT-2's Conv1D multiplies
            return _Product.apply(args[1], args[2], False) + args[0]  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():  # results are ordinary tensors, not of this class
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return args[0].with_parts(lambda part: part)
        device = (kwargs or {}).get("device")
        if func is aten._to_copy.default and device not in (None, args[0].device):
            return args[0].with_parts(lambda part: part.to(device))
        if func._schema.is_mutable:
            raise TypeError(f"{func} would write into a {args[0].kind} weight, which is frozen")
        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def quantize(weight: Tensor, kind: Kind, dtype: torch.dtype) -> Quantized:
    """A matrix as codes, [rows, width]; what is computed from it is in `dtype`."""
    return Quantized(_FORMATS[kind][0](weight.detach()), kind, weight.shape, dtype)


def dense(tensor: Any) -> Any:
    """The numbers of what is held as codes, and everything else as it is."""
    return tensor.dense() if isinstance(tensor, Quantized) else tensor


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _Product.apply(x, weight, True)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    """x W' for a weight [outputs, inputs], or x W for one that is kept the other way round; keeps codes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized, turned: bool) -> Tensor:
        ctx.weight, ctx.turned = weight, turned
        held = weight.dense()
        if not turned:
            return x @ held
        return products.nt(x.flatten(0, -2), held).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        held = ctx.weight.dense()
        if not ctx.turned:
            return dy @ held.T, None, None
        return products.nn(dy.flatten(0, -2), held).unflatten(0, dy.shape[:-1]), None, None
