"""AdaLoRA's schedule (Zhang et al. 2023, arXiv 2303.10512): ranks go where they matter, and A and B stay orthogonal.

The one idea: peft's allocator acts, and what it remembers from step to step lies in `Adapter.memory`, which every
checkpoint holds. A step is so a function of what is saved, and a resumed run is the run that was not broken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.adapt.peft_config import NAME
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.adapt.adapter import Adapter

# of each matrix its importance and how sure that is; of each row of E whether it is kept
_IMPORTANCE, _SURENESS, _KEPT = "importance.", "sureness.", "kept."


def memory(whole: Any) -> dict[str, Tensor]:
    """What the allocator begins with. Raises ConfigError where there is nothing to allocate."""
    settings = whole.peft_config[NAME]
    if settings.target_r >= settings.init_r:
        told = f"target_r {settings.target_r} is not below init_r {settings.init_r}"
        raise ConfigError(told, where="method.config", hint="LoRA is the method whose ranks stay as they are")
    if settings.rank_pattern:  # of a file: ranks are given away already
        return {}
    found = {
        kind + name: torch.zeros_like(value) for name, value in _ranked(whole) for kind in (_IMPORTANCE, _SURENESS)
    }
    kept = {_KEPT + name: torch.ones(len(value)) for name, value in _ranked(whole) if ".lora_E." in name}
    return {name: value.detach() for name, value in sorted((found | kept).items())}


def penalty(adapter: Adapter) -> Tensor:
    """How far A and B are from orthogonal (equation 5): the mean over all of |M M' - I|, times `orth_reg_weight`."""
    from tunesmith.adapt.peft_layers import whole_of

    whole = whole_of(adapter)
    parts = []
    for name, value in _ranked(whole):
        if ".lora_E." not in name:
            product = value @ value.T if ".lora_A." in name else value.T @ value
            parts.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=value.device)))
    weight: float = whole.peft_config[NAME].orth_reg_weight
    return weight * torch.stack(parts).mean()


def after_step(adapter: Adapter, step: int, total_steps: int) -> None:
    """Weighs what a step has moved, by its gradients, and sets singular values to zero that are over the budget.

    Raises:
        ConfigError: the run is too short for `tinit` and `tfinal`.
    """
    from tunesmith.adapt.peft_layers import whole_of

    if not adapter.memory:
        return
    whole = whole_of(adapter)
    settings, allocator = whole.peft_config[NAME], whole.base_model.rankallocator
    if "total_step" not in getattr(adapter.method, "config", {}):
        settings.total_step = total_steps
    if settings.tinit >= settings.total_step - settings.tfinal:
        told = f"tinit {settings.tinit} and tfinal {settings.tfinal} leave none of {settings.total_step} steps between"
        raise ConfigError(told, where="method.config", hint="fewer of them, or more steps")
    held = adapter.memory
    names = [name for name, _ in _ranked(whole)]
    allocator.exp_avg_ipt = {name: held[_IMPORTANCE + name].to(value.device) for name, value in _ranked(whole)}
    allocator.exp_avg_unc = {name: held[_SURENESS + name].to(value.device) for name, value in _ranked(whole)}
    allocator.ipt = dict(allocator.exp_avg_ipt)  # computed anew before it is read
    kept = [name.removeprefix(_KEPT) for name in held if name.startswith(_KEPT)]
    settings.rank_pattern = {name: held[_KEPT + name].bool().tolist() for name in kept}
    whole.base_model.update_and_allocate(step)
    with torch.no_grad():
        for name in names:  # the allocator forgets at the end of the schedule, and asks no more
            held[_IMPORTANCE + name].copy_(allocator.exp_avg_ipt.get(name, held[_IMPORTANCE + name]))
            held[_SURENESS + name].copy_(allocator.exp_avg_unc.get(name, held[_SURENESS + name]))
        for name in kept:
            held[_KEPT + name].copy_(torch.tensor(settings.rank_pattern[name]))
    # the file has all rows: those that are not kept are zeros
    settings.rank_pattern = None
    allocator.reset_ipt()


def _ranked(whole: Any) -> Iterator[tuple[str, Tensor]]:
    """The three matrices of every layer, by the allocator's names."""
    return ((name, value) for name, value in whole.base_model.model.named_parameters() if ".lora_" in name)
