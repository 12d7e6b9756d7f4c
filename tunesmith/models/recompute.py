"""Activation recomputation: what a block makes is not kept for the backward but made again in it.

The one idea: the second run enters the route and the segments of the first and draws the same dropout, so that the
gradients are the same bits. `Recompute` says how many blocks run again as a whole and of how many only the inner
product of the MLP is made again, which is most of what a block keeps; the planner chooses (`plan.choice`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.errors import ConfigError
from tunesmith.models.route import checkpoint_contexts
from tunesmith.models.targets import block_paths

if TYPE_CHECKING:
    from tunesmith.models.families import Family

How = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """How many blocks make something again, from the lowest that trains or has something below it that does.

    Attributes:
        whole: blocks that keep only their inputs.
        partly: the next above these, whose MLP alone is made again.
    """

    whole: int = 0
    partly: int = 0


class Blocks:
    """The blocks of a model that keep something for the backward, from the lowest.

    What is made again is chosen from the lowest up: in the backward it is made when those above are done and gone,
    so that it does not come on top of what they keep.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        paths = block_paths(model, family)
        self.all = [model.get_submodule(path) for path in paths]
        self.mlps = [_mlp_of(block, family) for block in self.all]
        self.lowest = _lowest(model, paths)
        self.name = family.name

    @property
    def count(self) -> int:
        return len(self.all) - self.lowest

    def set(self, how: How | Recompute) -> None:
        """Makes this the policy of the model from now on. Raises ConfigError where no blocks are known."""
        if how != "none" and not self.all:
            raise ConfigError(f"the blocks of {self.name} are not known", where="train.recompute")
        for module in (*self.all, *self.mlps):
            _keep(module)
        for block, mlp, wanted in zip(self.all, self.mlps, self._each(how), strict=False):
            if wanted != "none":
                _make_again(block if wanted == "full" else mlp)

    def _each(self, how: How | Recompute) -> list[How]:
        """What is wanted of each block; of those above the last one, nothing."""
        if isinstance(how, Recompute):
            return [*["none"] * self.lowest, *["full"] * how.whole, *["selective"] * how.partly]  # type: ignore[list-item]
        return [how] * len(self.all)  # also of those that nothing trains in yet


def is_again(module: nn.Module) -> bool:
    """Whether what the module keeps is to be made again."""
    return getattr(module.__dict__.get("forward"), "func", None) is again


def recompute(modules: Sequence[nn.Module]) -> None:
    """Makes modules keep only their inputs while gradients are wanted. Twice is the same as once."""
    for module in modules:
        _make_again(module)


def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs something now, and once more in the backward instead of keeping what it made."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    run = partial(forward, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, context_fn=checkpoint_contexts)


@contextmanager
def made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Operations within keep, of this tensor, only how it is made again: once a backward, however many want it.

    Args:
        make: has its values, without gradients. Must not hold it.
    """
    storage, shape, held = tensor.untyped_storage()._cdata, tensor.shape, _Remade(make)
    del tensor

    def pack(found: Tensor) -> Tensor | _Remade:
        if found.untyped_storage()._cdata != storage or found.shape != shape:
            return found
        held.wanted += 1
        return held

    def unpack(kept: Tensor | _Remade) -> Tensor:
        return kept.take() if isinstance(kept, _Remade) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Remade:
    """A tensor that is made when first taken and let go when all who want it have had it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make, self.wanted, self.taken = make, 0, 0
        self.found: Tensor | None = None

    def take(self) -> Tensor:
        if self.found is None:
            with torch.no_grad():
                self.found = self.make()
        found, self.taken = self.found, self.taken + 1
        if self.taken % self.wanted == 0:
            self.found = None
        return found


def _make_again(module: nn.Module) -> None:
    if not is_again(module):
        module.forward = partial(again, module.forward)


def _keep(module: nn.Module) -> None:
    if is_again(module):
        before = module.__dict__.pop("forward").args[0]
        if getattr(before, "__self__", None) is not module:  # it was replaced by somebody before
            module.forward = before


def _mlp_of(block: nn.Module, family: Family) -> nn.Module:
    """The module of a block that holds its MLP and nothing else; the block where there is none."""
    ups = [*family.inside.get("up", ()), *(name for name, (roles, _) in family.fused.items() if "up" in roles)]
    downs = {name.rpartition(".")[0] for name in family.inside.get("down", ())}
    inner = dict(block.named_modules())
    for place in (name.rpartition(".")[0] for name in ups if name in inner):
        if place and place in downs:
            return inner[place]
    return block


def _lowest(model: nn.Module, paths: Sequence[str]) -> int:
    """How many blocks have nothing that trains, nor anything that trains below them: they keep nothing."""
    passed: set[str] = set()
    for name, parameter in model.named_parameters():
        block = next((path for path in paths if name.startswith(path + ".")), "")
        if parameter.requires_grad:
            return len(passed - {block})
        passed |= {block} - {""}
    return 0
