"""Initial values of inserts: float32, on the device of the module they stand beside.

The one idea: what is random is drawn on the CPU from (seed, place) alone, so that it is the same on every device and
after any other draw. On the meta device nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.core.rng import torch_generator

if TYPE_CHECKING:
    from tunesmith.models.targets import Target


def filled(model: nn.Module, target: Target, *sizes: int, value: float = 0.0) -> nn.Parameter:
    """A parameter that holds one value everywhere."""
    return nn.Parameter(torch.full(sizes, value, device=_device(model, target)))


def uniform(model: nn.Module, target: Target, *sizes: int, bound: float, seed: int) -> nn.Parameter:
    """A parameter drawn from -bound to bound."""
    return _drawn(model, target, sizes, seed, lambda values, draw: values.uniform_(-bound, bound, generator=draw))


def normal(model: nn.Module, target: Target, *sizes: int, seed: int) -> nn.Parameter:
    """A parameter drawn from the standard normal distribution."""
    return _drawn(model, target, sizes, seed, lambda values, draw: values.normal_(generator=draw))


def _drawn(
    model: nn.Module,
    target: Target,
    sizes: tuple[int, ...],
    seed: int,
    fill: Callable[[Tensor, torch.Generator], Tensor],
) -> nn.Parameter:
    device = _device(model, target)
    if device.type == "meta":
        return nn.Parameter(torch.empty(sizes, device=device))
    return nn.Parameter(fill(torch.empty(sizes), torch_generator(seed, "init", target.path, target.role)).to(device))


def _device(model: nn.Module, target: Target) -> torch.device:
    return next(model.get_submodule(target.path).parameters(recurse=False)).device
