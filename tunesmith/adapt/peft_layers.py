"""Layers of the peft library, made for a model without touching it, and their files in peft's layout.

The one idea: peft works on a skeleton, a tree of empty modules with the model's maps and embeddings at their names.
What it wraps there is taken out again, with the wrapped module held by reference, so that a layer's own parameters are
all that it has. The method is `peft_bridge.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from tunesmith.adapt.peft_bridge import Peft
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.core.rng import seed_for
from tunesmith.models.ports import Insert, Port, port_kind

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded
    from tunesmith.models.ports import Acts

NAME = "default"  # of the adapter within peft; our own name never reaches it
PREFIX = "base_model.model."
_TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
# what would train or change more than the tuner's own layers do
_REFUSED = ("modules_to_save", "trainable_token_indices", "target_parameters")


class Layer(Insert):
    """An insert that holds one of peft's layers.

    Attributes:
        tuner: the layer; the module that it stands for is not among its submodules.
    """

    def __init__(self, method: Acts, tuner: Any) -> None:
        super().__init__(method, {}, None, 1.0)
        self.tuner = tuner


def layers(loaded: Loaded, kind: str, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """peft's layers for a model, by the name of the module that each stands for.

    Raises ConfigError for settings that peft refuses, or that are not bridged.
    """
    refused = [key for key in _REFUSED if config.get(key)]
    if refused:
        raise ConfigError(f"{refused[0]} is not bridged", where="method.config")
    skeleton = _skeleton(loaded.model)
    with torch.random.fork_rng(), warnings.catch_warnings(), _as_config_error(kind):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_for(seed, "init", "peft"))
        settings = _config(kind, {**config, "task_type": _TASKS.get(loaded.family.kind)})
        peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)](skeleton, settings, NAME)
    found = {path: module for path, module in skeleton.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        raise ConfigError("the settings put no layer anywhere", where="method.config")
    return {path: _own(layer) for path, layer in found.items()}


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `peft_bridge.written`."""
    method = adapter.method
    assert isinstance(method, Peft)
    task = _TASKS.get(adapter.loaded.family.kind)
    settings = _config(method.type, {**method.config, "task_type": task}).to_dict()
    # the modules themselves: a pattern or a family's default may mean others elsewhere
    settings |= {"target_modules": [port.path for port, _, _ in adapter.inserts()], "tunesmith_seed": adapter.seed}
    return {key: _plain(value) for key, value in settings.items()}, _tensors(adapter)


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """As `peft_bridge.read`."""
    from tunesmith.adapt.store import fill

    kind = str(settings["peft_type"])
    if not isinstance(own, Peft):
        known = set(peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__dataclass_fields__)
        kept = {key: value for key, value in settings.items() if key in known and value is not None}
        own = Peft(type=kind, config={key: value for key, value in kept.items() if key not in _OURS})
    seed = settings.get("tunesmith_seed", 0)
    if not isinstance(seed, int):
        raise AdapterError("tunesmith_seed is no number", where=where)
    adapter = own.attach(loaded, name, seed)
    fill(adapter, _tensors(adapter), tensors, where)
    return adapter


# settings that the file has for other reasons
_OURS = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "revision"
}  # fmt: skip


@contextmanager
def _as_config_error(kind: str) -> Iterator[None]:
    """What peft raises about settings is of many kinds, some without a word; around calls of peft alone."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        told = " ".join(str(error).split()) or f"{kind} cannot be made of these settings ({type(error).__name__})"
        raise ConfigError(f"peft: {told}", where="method.config") from error


def _config(kind: str, settings: Mapping[str, Any]) -> Any:
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**settings)


def _skeleton(model: nn.Module) -> nn.Module:
    """A tree of empty modules that holds the maps and embeddings of a model, without ports, at their names."""
    root = nn.Module()
    root.config = model.config  # type: ignore[assignment]
    for path, module in model.named_modules():
        bare = module.base if isinstance(module, Port) else module
        if port_kind(bare) not in (None, "norm"):
            place = root
            *parents, leaf = path.split(".")
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(leaf, bare)
    return root


def _own(layer: Any) -> Any:
    """A layer whose parameters are its own, in float32."""
    base = layer._modules.pop("base_layer")
    layer.__dict__["base_layer"] = base  # found as an attribute, and no submodule
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    return layer


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What peft stores, by its names."""
    found = {}
    for port, _, insert in adapter.inserts():
        assert isinstance(insert, Layer)
        for name, value in insert.tuner.state_dict(keep_vars=True).items():
            found[f"{PREFIX}{port.path}.{name.replace(f'.{NAME}', '', 1)}"] = value
    return found


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
