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

from tunesmith.train.probe import is_bf16_faster
from tunesmith.train.scaling import LossScale

if TYPE_CHECKING:
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

    Attributes:
        parameters: what the model computes with, by name.
        masters: what the optimizer updates, by the same names: the parameter itself or its fp32 copy.
        scaling: the factor of the loss; None where nothing is computed in fp16.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        section: PrecisionSection,
        stored: Stored = lambda name, held: None,
    ) -> None:
        self.parameters = dict(parameters)
        self.scaling = LossScale() if section.compute == "fp16" else None
        self.masters: dict[str, nn.Parameter] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        low = [name for name, parameter in self.parameters.items() if parameter.dtype.itemsize < 4]
        if low and not section.master:
            log.warning(
                "precision.master: false updates %d tensors in %s: updates smaller than a weight's rounding step "
                "are lost, and training stagnates at small learning rates; master: true avoids it",
                len(low),
                str(self.parameters[low[0]].dtype).removeprefix("torch."),
            )
        for name, parameter in self.parameters.items():
            own = section.master and name in low
            self.masters[name] = self._master(parameter, stored(name, parameter)) if own else parameter

    def _master(self, parameter: nn.Parameter, start: Tensor | None) -> nn.Parameter:
        master = nn.Parameter(parameter.detach().float() if start is None else start, requires_grad=True)
        self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_hand_over, master)))
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

    def clear(self) -> None:
        """Frees all gradients."""
        for tensor in (*self.masters.values(), *self.parameters.values()):
            tensor.grad = None

    def close(self) -> None:
        """Leaves the parameters as ordinary ones."""
        self.clear()
        for hook in self._hooks:
            hook.remove()


def _hand_over(master: nn.Parameter, parameter: nn.Parameter) -> None:
    if parameter.grad is None:
        return
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)  # promotes: the sum is fp32
    parameter.grad = None
