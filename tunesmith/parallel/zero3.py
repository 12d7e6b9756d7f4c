"""ZeRO stage 3: the weights are split, too, the frozen base as well; torch's FSDP2 gathers them block by block.

A block's weights are whole only while it computes, forward and again backward, and its gradients are reduced and
scattered as soon as they are there: 3 psi sent a micro-batch (Rajbhandari et al. 2020, arXiv 1910.02054, section 7.2;
Zhao et al. 2023, arXiv 2304.11277). What trains is held in float32, its own master; where the model computes in fewer
bits, FSDP2 casts what it gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tunesmith.core.errors import ConfigError
from tunesmith.models.copies import swaps
from tunesmith.models.ports import Port, attached_to, held_by, ports
from tunesmith.models.recompute import Blocks
from tunesmith.parallel.ddp import refuse_watchers
from tunesmith.parallel.layout import Held
from tunesmith.parallel.pieces import Place
from tunesmith.parallel.sharded import Sharded
from tunesmith.parallel.traffic import CountedAllGather, CountedReduceScatter


class Zero3(Sharded):
    """Weights, gradients and optimizer state in parts, by rows of every tensor."""

    in_step = in_parts = True

    def adopt(self, tuned: Any) -> Any:
        """The same with its weights in parts. Raises ConfigError for a method that needs them whole."""
        self._refuse(tuned)
        policy = tuned.policy
        at = _places_of(policy.model, tuned.parameters)
        low = {held.dtype for held in tuned.parameters.values() if held.dtype.itemsize < 4}
        stored = getattr(tuned, "stored", lambda name, held: None)
        for name, parameter in tuned.parameters.items():
            if parameter.dtype in low:
                start = stored(name, parameter)
                parameter.data = parameter.data.float() if start is None else start
        whole = list({id(held): held for held in held_by(policy.model)}.values())
        root = _Root(policy)
        self._shard(root, policy, MixedPrecisionPolicy(param_dtype=next(iter(low)), reduce_dtype=torch.float32)
                    if low else MixedPrecisionPolicy())  # fmt: skip
        tuned.parameters = {name: module._parameters[leaf] for name, (module, leaf) in at.items()}
        for swap in swaps(policy.model):  # whoever asks a module for its copy gets what stands there
            for leaves in swap.copies.values():
                leaves.update({leaf: swap.module._parameters[leaf] for leaf in leaves})  # type: ignore[misc]
        for parameter in whole:  # others may go on holding it, but not its numbers
            parameter.data = parameter.data.new_empty(0)
        tuned.policy = _ShardedPolicy(policy, root)
        return tuned

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.masters = held.masters
        for name, master in self.masters.items():
            local: Tensor = master.to_local()  # type: ignore[attr-defined]
            self.pieces[name] = nn.Parameter(local.detach())
            self.places[name] = _place(master.shape, self.world.size)
        return self.pieces

    def reduce(self, names: Collection[str]) -> set[str]:
        ordered = sorted(names)
        reached = self.world.sums([float(self.masters[name].grad is not None) for name in ordered])
        for name in ordered:
            gradient: Any = self.masters[name].grad
            piece = self.pieces[name]
            piece.grad = torch.zeros_like(piece) if gradient is None else gradient.to_local()
            self.masters[name].grad = None
        return {name for name, count in zip(ordered, reached, strict=True) if not count}

    def publish(self, held: Held, names: Collection[str]) -> None:
        """Nothing to do: a piece is part of the parameter itself."""

    def gradients(self) -> list[Tensor]:
        of_masters = [master.grad.to_local() for master in self.masters.values() if master.grad is not None]  # type: ignore[attr-defined]
        return [*of_masters, *(piece.grad for piece in self.pieces.values() if piece.grad is not None)]

    def _shard(self, root: _Root, policy: Any, precision: MixedPrecisionPolicy) -> None:
        device, group = next(held_by(policy.model)).device.type, self.world.traffic.group
        mesh = init_device_mesh(device, (self.world.size,)) if group is None else DeviceMesh.from_group(group, device)
        # other stages of a pipeline have the numbers of these
        absent = {held for held in held_by(policy.model) if not held.numel()}
        # the root, too, is freed after its forward: what is sent is then the same for all weights
        how: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
        units: list[nn.Module] = [*(block for block in _blocks(policy) if not absent >= {*block.parameters()}), root]
        gather, scatter = CountedAllGather(self.world.traffic), CountedReduceScatter(self.world.traffic)
        previous: FSDPModule | None = None
        for unit in units:
            sharded: FSDPModule = fully_shard(unit, ignored_params=absent, **how)  # type: ignore[assignment]
            # sums, not means: the loss is divided by the weight of all processes
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            sharded.set_custom_all_gather(gather)  # type: ignore[arg-type]
            sharded.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
            # torch takes the order of forwards, and in a pipeline others come between
            sharded.set_modules_to_backward_prefetch([previous or sharded])
            previous = sharded

    @staticmethod
    def _refuse(tuned: Any) -> None:
        refuse_watchers(tuned)
        if getattr(tuned, "phases", ()):
            told = "zero3 gathers what trains from the first step on, and the method has phases"
            raise ConfigError(told, where="layout.shard", hint="zero2 can do it")
        if any(parameter._backward_hooks for parameter in tuned.parameters.values()):
            told = "zero3 puts parameters of its own in place, and the method changes gradients by hooks on its own"
            raise ConfigError(told, where="layout.shard", hint="zero2 can do it")
        if _is_shared(tuned.policy):
            told = "zero3 gathers block by block, and numbers of the method act in all blocks"
            raise ConfigError(told, where="layout.shard", hint="zero2 can do it")
        if any(not parameter.ndim for parameter in tuned.parameters.values()):
            told = "zero3 splits tensors by rows, and the method trains a single number"
            raise ConfigError(told, where="layout.shard", hint="zero2 can do it")


class _Root(nn.Module):
    """Everything of a model that is outside of its blocks, prediction heads included; whole while a policy is asked."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.model = policy.model
        self.heads = nn.ModuleList(_heads(policy.model))

    def forward(self, asked: Callable[..., Tensor], *args: Any) -> Tensor:
        return asked(*args)


class _ShardedPolicy:
    """A policy whose model is in parts."""

    def __init__(self, policy: Any, root: _Root) -> None:
        self._policy, self._root = policy, root

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def train(self, mode: bool = True) -> _ShardedPolicy:
        self._policy.train(mode)
        return self

    def token_losses(self, batch: Any) -> Tensor:
        found: Tensor = self._root(self._policy.token_losses, batch)
        return found

    def hidden(self, batch: Any) -> Tensor:
        # a copy, for what FSDP2 hears its gradient by must not be changed as a view of something else
        found: Tensor = self._root(lambda batch: self._policy.hidden(batch).clone(), batch)
        return found

    def scores(self, batch: Any) -> Tensor:
        found: Tensor = self._root(self._policy.scores, batch)
        return found

    def reference_losses(self, batch: Any) -> Tensor:
        found: Tensor = self._root(self._policy.reference_losses, batch)
        return found


def _blocks(policy: Any) -> list[nn.Module]:
    """The blocks of a model that transformers has; a model of another kind is one."""
    family = getattr(policy, "family", None)
    return [] if family is None else Blocks(policy.model, family).all


def _is_shared(policy: Any) -> bool:
    """Whether something of one block acts in another: a parameter that stands in both, or, in a block whose inserts
    have none at all, one from elsewhere."""
    blocks = _blocks(policy)
    held = [id(parameter) for block in blocks for parameter in {*block.parameters()}]
    groups = [ports(block) for block in blocks]
    inside = {id(port) for group in groups for port in group}
    groups.append([port for port in ports(policy.model) if id(port) not in inside])
    return len(held) > len(set(held)) or any(_borrows(group) for group in groups)


def _borrows(group: Sequence[Port]) -> bool:
    inserts = [insert for port in group for adapter in port.inserts for insert in port.of(adapter)]
    return bool(inserts) and not any(insert.trained() for insert in inserts)


def _heads(model: nn.Module) -> list[nn.Module]:
    return list(attached_to(model).heads.values())


def _places_of(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Module, str]]:
    """Where each parameter stands: FSDP2 puts another one there."""
    found = {}
    for top in (model, *_heads(model)):
        for module in top.modules():
            found.update({id(held): (module, leaf) for leaf, held in module._parameters.items() if held is not None})
    return {name: found[id(parameter)] for name, parameter in wanted.items()}


def _place(shape: torch.Size, size: int) -> Place:
    """Rows as FSDP2 cuts them: equal parts, the last ones shorter or empty (`torch.chunk`)."""
    rows, width = -(-shape[0] // size), shape[1:].numel()
    ends = [min(shape[0], rank * rows) * width for rank in range(size + 1)]
    return Place(shape, tuple(pairwise(ends)))
