"""Tensor parallelism: each process has some heads and some of the MLP's inner features of every block.

The one idea: q, k, v, gate and up are cut by columns and o and down by rows, so that a block needs two sums of
activations forward and two backward (Shoeybi et al. 2019, arXiv 1909.08053, section 3): of what o and down make, and
of the gradients of what goes into attention and the MLP. Parameters stay ordinary tensors, only smaller, so ports,
optimizer and checkpoints never notice; of a low-rank change the factor on the cut side is cut and the other is whole,
and gradients of what is whole within a cut are added up. Embedding, head and norms are whole on every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.families import Family
from tunesmith.models.ports import Port
from tunesmith.models.targets import block_paths
from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.parts import Parts
from tunesmith.parallel.world import World

COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")


class TensorParallel(Parts):
    """Matrices in parts."""

    def __init__(self, world: World, section: LayoutSection) -> None:
        super().__init__(world, section)
        self._hooks: list[Any] = []

    def adopt(self, tuned: Any) -> Any:
        """The same with this process's part of every block."""
        policy = tuned.policy
        finer = self._finer(tuned)
        axes: dict[int, int] = {}
        shared: set[int] = set()
        for path in block_paths(policy.model, policy.family):
            block = policy.model.get_submodule(path)
            self._cut_block(block, policy.family, axes, shared)
            self._hear_block(block, policy.family)
        for name, parameter in tuned.parameters.items():
            if id(parameter) in axes:
                self.axes[name] = axes[id(parameter)]
            elif id(parameter) in shared:
                self.shared.add(name)
        if finer:
            tuned.stored = lambda name, held: self._mine(finer.pop(name, None), self.axes.get(name))
        return tuned

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()

    def _finer(self, tuned: Any) -> dict[str, Tensor]:
        """What parameters were rounded from, found while they are whole."""
        stored = getattr(tuned, "stored", lambda name, held: None)
        low = {name: held for name, held in tuned.parameters.items() if held.dtype.itemsize < 4}
        found = {name: stored(name, held) for name, held in low.items()}
        return {name: held for name, held in found.items() if held is not None}

    def _cut_block(self, block: nn.Module, family: Family, axes: dict[int, int], shared: set[int]) -> None:
        for roles, axis in ((COLUMNS, 0), (ROWS, 1)):
            for role in roles:
                for name in family.inside.get(role, ()):
                    self._cut_map(block.get_submodule(name), axis, axes, shared)
        for name in family.inside.get("norm", ()):
            # a norm of heads sees those of its process alone
            if name.startswith("self_attn."):
                shared.update(id(held) for held in block.get_submodule(name).parameters())

    def _cut_map(self, module: nn.Module, axis: int, axes: dict[int, int], shared: set[int]) -> None:
        base = module.base if isinstance(module, Port) else module
        for held in base.parameters(recurse=False):
            # a bias is cut with the columns; `run.spreading` refuses one behind rows
            self._shrink(held, axis if held.ndim > 1 else 0, axes)
        if not isinstance(module, Port):
            return
        for inserts in module.inserts.children():
            for insert in inserts.children():
                cut, whole = (insert["B"], insert["A"]) if axis == 0 else (insert["A"], insert["B"])  # type: ignore[index]
                self._shrink(cut, axis, axes)
                shared.add(id(whole))

    def _shrink(self, parameter: nn.Parameter, axis: int, axes: dict[int, int]) -> None:
        parameter.data = self._mine(parameter.data, axis)
        axes[id(parameter)] = axis

    def _mine(self, whole: Any, axis: int | None) -> Any:
        """This process's part of a tensor; the tensor where it is not cut, or None."""
        if whole is None or axis is None:
            return whole
        return whole.chunk(self.split.size, axis)[self.split.rank].clone()

    def _hear_block(self, block: nn.Module, family: Family) -> None:
        """Puts the sums where a block needs them."""
        into = {name.rpartition(".")[0] for role in COLUMNS for name in family.inside.get(role, ())}
        for name in sorted(into):
            self._hooks.append(block.get_submodule(name).register_forward_pre_hook(self._into, with_kwargs=True))
        for role in ROWS:
            for name in family.inside.get(role, ()):
                self._hooks.append(block.get_submodule(name).register_forward_hook(self._out_of))

    def _into(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The states that a sublayer reads, whose gradients are added up."""
        if args:
            return (_Into.apply(args[0], self.split), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _Into.apply(kwargs["hidden_states"], self.split)}

    def _out_of(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """What the parts of a map cut by rows make, added up."""
        return _OutOf.apply(output, self.split)


class _Into(torch.autograd.Function):
    """Nothing forward, the sum of the gradients backward: f of section 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: World) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _summed(gradient, ctx.parts), None


class _OutOf(torch.autograd.Function):
    """The sum forward, nothing backward: g of section 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: World) -> Tensor:
        return _summed(x, parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, None


def _summed(x: Tensor, parts: World) -> Tensor:
    found = x.contiguous().clone()
    parts.traffic.all_reduce(found, kind="activations")
    return found
