"""The numbers of a model's folder that its parameters were rounded from, for masters that start from them.

The one idea: a stored tensor is taken only where rounding it gives the parameter's present bits. So a name that
misleads, or weights that have changed since, can only be left out, never be wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunesmith.models.copies import sharing
from tunesmith.models.folder import weight_files
from tunesmith.models.ports import base_state
from tunesmith.models.reading import STORED
from tunesmith.models.weights import TensorSpec, read_header

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded


class Stored:
    """The tensors of a model folder by the names that the model has for them; each is read when it is asked for.

    Args:
        loaded: the model as it was loaded from its folder, whatever adapters are on it by now.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.folder = loaded.model, loaded.folder

    @cached_property
    def own(self) -> Collection[str]:
        """Names that the base's tensors have."""
        return base_state(self.model).keys()

    @cached_property
    def places(self) -> dict[str, tuple[Path, TensorSpec]]:
        """File and entry of every stored tensor. Raises ModelError where the folder's weights are gone or damaged."""
        return stored_places(self.model, weight_files(self.folder))

    def finer(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        """The numbers that a base parameter, or a fresh copy of it, was rounded from: float32, in its shape.

        None where the file has no more of it than the parameter, or nothing that rounds to it. Raises ModelError where
        the folder's weights are gone or damaged.

        Args:
            name: of the base parameter; where it is tied, any of its names.
        """
        names = sharing(self.model, name) if name in self.own else []
        for path, spec in (self.places[one] for one in names if one in self.places):
            if spec.dtype == STORED.get(parameter.dtype) or spec.shape != tuple(parameter.shape):
                continue
            with safe_open(path, "pt") as file:  # anew each time: its pages are given back
                found: Tensor = file.get_tensor(spec.name).to(parameter.device)
                if found.is_floating_point() and torch.equal(found.to(parameter.dtype), parameter.detach()):
                    return found.to(torch.float32, copy=True)
        return None


def stored_places(model: nn.Module, files: list[Path]) -> dict[str, tuple[Path, TensorSpec]]:
    """File and entry of every stored tensor that is one tensor of the model, by its name there."""
    # transformers' own way from the names of files, old and bare ones among them, to those of modules
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]  # type: ignore[arg-type]
    own, prefix = base_state(model), str(getattr(model, "base_model_prefix", ""))
    found = {}
    for path in files:
        for stored, spec in read_header(path).items():
            name = stored if stored in own else rename_source_key(stored, renamings, [], prefix, own)[0]
            found[name] = (path, spec)
    return found
