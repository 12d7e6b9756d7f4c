"""Biases for maps that have none: which settings of a config make transformers give them one.

The one idea: nothing is believed of a family. A switch counts for what appears in a model that is built, without
weights, from the config with the switch on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import AdapterError

SWITCHES = ("attention_bias", "mlp_bias")


def add_biases(model: nn.Module, paths: Sequence[str]) -> Callable[[], None]:
    """Gives maps a bias of zero and tells the config, so that the saved model loads with them; answers what undoes it.

    Other maps that the same switches give a bias get one of zero, too.

    Raises:
        AdapterError: a map has no bias in this family, whatever its config says.
    """
    config: Any = model.config
    plain = _biased(model, {}) if paths else set()
    found = {name: _biased(model, {name: True}) - plain for name in SWITCHES if getattr(config, name, None) is False}
    used = {name: places for name, places in found.items() if paths and places & set(paths)}
    missing = [path for path in paths if not any(path in places for places in used.values())]
    if missing:
        raise AdapterError(f"{missing[0]} has no bias that a plain {config.model_type} model could keep")
    modules = [model.get_submodule(path) for path in sorted(set().union(*used.values()))]
    for module in modules:
        weight = module._parameters["weight"]
        assert weight is not None
        zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        module._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)
    for name in used:
        setattr(config, name, True)

    def undo() -> None:
        for module in modules:
            module._parameters["bias"] = None
        for name in used:
            setattr(config, name, False)

    return undo


def _biased(model: nn.Module, changes: dict[str, bool]) -> set[str]:
    """Paths of modules with a bias in a model of the same class and a changed config."""
    config: Any = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    build: Any = type(model)
    with torch.device("meta"):
        bare: nn.Module = build(config)
    return {path for path, module in bare.named_modules() if module._parameters.get("bias") is not None}
