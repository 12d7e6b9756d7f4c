"""In what numbers a step is computed: what is held in few bits is trained through a copy in many.

A parameter in bf16 or fp16 gets an fp32 master. Its gradient is added to the master's as soon as a backward pass has
finished it, in fp32, and freed; the optimizer sees masters only; after the update they are rounded back.
Parameters that are fp32 already (adapters: their ports cast them on use) are their own masters. In fp16 the loss is
scaled (`scaling.py`), adapters' too: their gradients come through fp16 activations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from tunesmith.kernels.lowrank import LaidOut
from tunesmith.train.probe import is_bf16_faster
from tunesmith.train.scaling import LossScale
from tunesmith.train.scratch import let_go

if TYPE_CHECKING:
    from tunesmith.train.apart import Room
    from tunesmith.train.section import PrecisionSection

log = logging.getLogger(__name__)

Stored = Callable[[str, nn.Parameter], Tensor | None]


def resolve(section: PrecisionSection, device: torch.device | str = "cpu") -> Literal["fp32", "bf16", "fp16"]:
    """The compute format that `auto` stands for on a device: bf16 where its hardware multiplies faster in it."""
    if section.compute != "auto":
        return section.compute
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if is_bf16_faster() else "fp32"


class Precision:
    """Holds the masters of a set of parameters while they are trained.

    Args:
        stored: the numbers that a parameter was rounded from, float32, where they are known. A master that starts from
            the rounded ones lies on their grid, and small updates move no weight until they have added up.
        room: where copies are kept apart (`apart.room_for`); None keeps them beside the parameters.

    Attributes:
        parameters: what the model computes with, by name.
        masters: what the optimizer updates, by the same names: the parameter itself or its fp32 copy.
        laid: low-rank factors as the passes of a step want them.
        scaling: the factor of the loss; None where nothing is computed in fp16.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        section: PrecisionSection,
        stored: Stored = lambda name, held: None,
        room: Room | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.scaling = LossScale() if section.compute == "fp16" else None
        self.masters: dict[str, nn.Parameter] = {}
        self._rooms: dict[nn.Parameter, Tensor] = {}  # for gradients that have not come yet
        self._moved: set[str] = set()
        self.laid = LaidOut()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        low = [name for name, parameter in self.parameters.items() if parameter.dtype.itemsize < 4]
        if low and not section.master:
            log.warning(
                "precision.master: false updates %d tensors in %s: updates smaller than a weight's rounding step "
                "are lost, and training stagnates at small learning rates; master: true avoids it",
                len(low),
                str(self.parameters[low[0]].dtype).removeprefix("torch."),
            )
        own = low if section.master else []
        rooms = room({name: self.parameters[name].shape for name in own}) if room and own else {}
        for name, parameter in self.parameters.items():
            start = stored(name, parameter) if name in own else None
            self.masters[name] = self._master(name, start, rooms.get(name)) if name in own else parameter

    def make_room(self) -> None:
        """Takes memory for all gradients in one piece, before the first of several passes whose gradients are summed.

        Taken one by one in that pass, it would lie between tensors that are freed then, and the larger ones of the next
        pass would not fit between them.
        """
        masters = {name: self.masters[name] for name, held in self.parameters.items() if held.requires_grad}
        for kind in {(master.dtype, master.device) for master in masters.values()}:
            alike = {name: master for name, master in masters.items() if (master.dtype, master.device) == kind}
            sizes = [master.numel() for master in alike.values()]
            parts = torch.empty(sum(sizes), dtype=kind[0], device=kind[1]).split(sizes)
            for (name, master), part in zip(alike.items(), parts, strict=True):
                self._rooms[master] = part.view(master.shape)
                self._move_when_there(name, master)

    def _move_when_there(self, name: str, master: nn.Parameter) -> None:
        if name not in self._moved:
            self._moved.add(name)
            hook = partial(_hand_over, self._rooms, master)
            self._hooks.append(self.parameters[name].register_post_accumulate_grad_hook(hook))

    def _master(self, name: str, start: Tensor | None, room: Tensor | None) -> nn.Parameter:
        value = self.parameters[name].detach().float() if start is None else start
        if room is not None:
            value = room.copy_(value)
            let_go(value)
        master = nn.Parameter(value, requires_grad=True)
        self._move_when_there(name, master)
        return master

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, scaled where there is scaling, to the masters' gradients."""
        (loss if self.scaling is None else loss * self.scaling.scale).backward()

    def publish(self) -> None:
        """Rounds the masters into the parameters that the model computes with."""
        with torch.no_grad():
            for name, master in self.masters.items():
                parameter = self.parameters[name]
                if parameter is not master:
                    parameter.copy_(master)
                    let_go(master)

    def clear(self) -> None:
        """Frees all gradients."""
        for tensor in (*self.masters.values(), *self.parameters.values()):
            tensor.grad = None
        self._rooms.clear()

    def close(self) -> None:
        """Leaves the parameters as ordinary ones."""
        self.clear()
        for hook in self._hooks:
            hook.remove()


def _hand_over(rooms: dict[nn.Parameter, Tensor], master: nn.Parameter, parameter: nn.Parameter) -> None:
    """Moves a gradient that has come to where it is summed."""
    gradient = parameter.grad
    if gradient is None:
        return
    if parameter is not master and master.grad is not None:
        master.grad.add_(gradient.to(master.device))  # promotes: the sum is fp32
    elif master in rooms:
        master.grad = rooms.pop(master).copy_(gradient)
    elif parameter is not master:
        master.grad = gradient.to(master.device, torch.float32)
    if parameter is not master:
        parameter.grad = None
