"""Tensor parallelism: each process has some heads and some of the MLP's inner features of every block.

The one idea: q, k, v, gate and up are cut by columns and o and down by rows, so that a block needs two sums of
activations forward and two backward (Shoeybi et al. 2019, arXiv 1909.08053, section 3): of what o and down make, and
of the gradients of what goes into attention and the MLP. Parameters stay ordinary tensors, only smaller, so ports,
optimizer and checkpoints never notice. What a method puts beside a map is cut with it; or it acts on parts, whole, and
its gradients are added up; or it stands behind the sum. Embedding, head and norms are whole on every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.models.copies import swap_of
from tunesmith.models.families import Family
from tunesmith.models.ports import Port
from tunesmith.models.targets import block_paths
from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.parts import Parts
from tunesmith.parallel.world import World

COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")
# parameters of inserts by name: the axis that is cut beside columns, and beside rows; None is whole. Others are whole
INSERTS: dict[str, tuple[int | None, int | None]] = {
    "A": (None, 1),
    "B": (0, None),
    "b": (0, None),
    "outputs": (0, None),
    "inputs": (None, 0),
    "vectors": (1, None),
}
# of these, what acts on parts, before their sum; what else there is at rows acts on the sum
ON_PARTS = ("A", "B", "inputs")


class TensorParallel(Parts):
    """Matrices in parts."""

    def __init__(self, world: World, section: LayoutSection) -> None:
        super().__init__(world, section)
        self._hooks: list[Any] = []

    def cut(self, tuned: Any) -> None:
        """Leaves this process's part of every block."""
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
        for axis, roles in enumerate((COLUMNS, ROWS)):
            for role in roles:
                for name in family.inside.get(role, ()):
                    self._cut_map(block.get_submodule(name), axis, axes, shared)
        for name in family.inside.get("norm", ()):
            # a norm of heads sees those of its process alone
            if name.startswith("self_attn."):
                shared.update(id(held) for held in block.get_submodule(name).parameters())

    def _cut_map(self, module: nn.Module, axis: int, axes: dict[int, int], shared: set[int]) -> None:
        base, swap = (module.base if isinstance(module, Port) else module), swap_of(module)
        copied = swap.base.values() if swap is not None else ()
        for held in (*base.parameters(recurse=False), *copied):
            # a bias is cut with the columns; `limits.check_model` refuses one behind rows
            self._shrink(held, axis if held.ndim > 1 else 0, axes)
        for name, held in _inserted(module):
            cut = INSERTS.get(name, (None, None))[axis]
            if cut is not None:
                self._shrink(held, cut, axes)
            elif name in ON_PARTS:
                shared.add(id(held))

    def _shrink(self, parameter: Tensor, axis: int, axes: dict[int, int]) -> None:
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
                self._hooks.append(_summing(block.get_submodule(name)).register_forward_hook(self._out_of))

    def _into(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The states that a sublayer reads, whose gradients are added up."""
        if args:
            return (_Into.apply(args[0], self.split), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _Into.apply(kwargs["hidden_states"], self.split)}

    def _out_of(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """What the parts of a map cut by rows make, added up."""
        return _OutOf.apply(output, self.split)


def _inserted(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What inserts of all adapters have at a map, by name; what a factor A began as, A0, is cut as it is."""
    adapters = module.inserts.children() if isinstance(module, Port) else ()
    inserts = [insert for adapter in adapters for insert in adapter.children()]
    held = [found for insert in inserts for found in (*insert.named_parameters(), *insert.named_buffers())]
    return [(name.removesuffix("0"), tensor) for name, tensor in held]


def _summing(module: nn.Module) -> nn.Module:
    """Behind which module at rows the parts are added up: before what acts on their sum."""
    names = {name for name, _ in _inserted(module)}
    if not isinstance(module, Port) or names <= set(ON_PARTS):
        return module
    if names & set(ON_PARTS):
        told = f"adapters at {module.path} act on parts of a sum and on the sum"
        raise ConfigError(told, where="layout.tensor", hint="merge one of them first, or use layout.pipeline")
    return module.base


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
