"""Which weights of a model are held as codes, and how they are read: one at a time, from the file's own numbers.

The maps of the blocks are; embedding, output head, norms and biases are not, as in QLoRA (Dettmers et al. 2023, arXiv
2305.14314). What is quantised is never there as a whole, neither as the file has it nor as it is computed with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunesmith.core.errors import ModelError
from tunesmith.kernels.quantized import Kind, dense, quantize
from tunesmith.models.ports import port_kind
from tunesmith.models.weights import TensorSpec

Place = tuple[Path, TensorSpec]


def quantisable(model: Any) -> list[str]:
    """Names of the weights of all linear maps but the output head, and but what several modules share."""
    head = model.get_output_embeddings()
    shared: dict[int, int] = {}
    for _, held in model.named_parameters(remove_duplicate=False):
        shared[id(held)] = shared.get(id(held), 0) + 1
    return [
        f"{path}.weight"
        for path, module in model.named_modules()
        if module is not head and port_kind(module) in ("linear", "conv1d") and shared[id(module.weight)] == 1
    ]


def hold_as_codes(model: nn.Module, names: list[str], kind: Kind, dtype: torch.dtype, places: dict[str, Place]) -> None:
    """Puts codes in the place of weights.

    Args:
        dtype: what is computed from them is in it.
        places: where the file has the numbers of some; of all others the model has them.

    Raises:
        ModelError: NaN or infinity in a weight.
    """
    for name in names:
        owner = model.get_submodule(name.removesuffix(".weight"))
        held = owner._parameters["weight"]
        assert held is not None
        weight = held.detach() if name not in places else _read(places[name])
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ModelError(f"NaN or infinity in the weights: {name}")
        owner._parameters["weight"] = nn.Parameter(quantize(weight, kind, dtype), requires_grad=False)


@torch.no_grad()
def requantise(model: nn.Module, kind: Kind, before: Mapping[str, Tensor]) -> tuple[float, float]:
    """Replaces the same weights, as they are now, by the numbers of their codes, in place.

    Args:
        before: the weights as they were when nothing had been merged into them, by name.

    Returns:
        The norm of what that changed, as a share of the norm of the weights, and of what merging had changed (0 where
        that is nothing). A small change of a large weight lies between two codes: the first share may be tiny and the
        change lost.
    """
    rounding = whole = merged = 0.0
    for name in quantisable(model):
        owner = model.get_submodule(name.removesuffix(".weight"))
        weight = owner._parameters["weight"]
        assert weight is not None
        now = dense(weight.detach())
        rounded = quantize(now, kind, now.dtype).dense()
        rounding += float((rounded.double() - now.double()).square().sum())
        whole += float(now.double().square().sum())
        merged += float((now.double() - dense(before[name]).double()).square().sum())
        owner._parameters["weight"] = nn.Parameter(rounded, requires_grad=False)
    return math.sqrt(rounding / whole), math.sqrt(rounding / merged) if merged else 0.0


def _read(place: Place) -> Tensor:
    path, spec = place
    with safe_open(path, "pt") as file:  # anew each time: its pages are given back
        found: Tensor = file.get_tensor(spec.name)
        return found.float()
