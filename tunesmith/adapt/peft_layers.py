"""Layers of the peft library, made for a model without touching it, and their files in peft's layout.

The one idea: peft works on a skeleton, a tree of empty modules with the model's maps, embeddings and norms at their
names. What it wraps there is taken out again, with the wrapped module held by reference, so that a layer's own
parameters are all that it has. The skeleton stays: peft reads and writes its files through it. A tensor that layers
share trains once, under the name of the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tunesmith.adapt.peft_config import NAME, as_config_error, as_json, made, method_of, seed_of, stored
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.core.rng import seed_for
from tunesmith.models.copies import as_base, base_parameter, swap_of, swaps
from tunesmith.models.inserts import Insert
from tunesmith.models.ports import INSERTS, Port, port_kind, ports

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.adapt.peft_bridge import Peft
    from tunesmith.models.inserts import Acts
    from tunesmith.models.load import Loaded

# types that look at values to find shapes: on the meta device they get some of their own
_LOOK = ("FROD", "SHIRA")
# whose forward asks for values or for sparse tensors, by their modules in peft
_NO_TRACE = ("frod", "poly", "shira", "waveft")


class Layer(Insert):
    """An insert that holds one of peft's layers.

    Attributes:
        tuner: the layer; the module that it stands for is not among its submodules.
        shared: what all layers of the adapter share and none holds; at the first.
        owned: names of what trains here and at no layer before.
        whole: peft's model around the skeleton, for files; the same for all layers of the adapter.
    """

    whole: Any

    def __init__(self, method: Acts, tuner: Any, whole: Any) -> None:
        super().__init__(method, {}, None, 1.0)
        self.tuner, self.shared = tuner, nn.ModuleDict()
        self.__dict__["whole"] = whole
        self.owned: set[str] = set()

    def trained(self) -> dict[str, nn.Parameter]:
        """What is owned."""
        return {name: value for name, value in self.named_parameters() if name in self.owned}

    def change(self, x: Tensor) -> Tensor:
        """What the layer says of x, less what its module does."""
        base = self.port.base
        with as_base(swap_of(base)):  # some layers read the weights of their module
            said: Tensor = self._answer(x) - base(x)
        return said

    def _answer(self, x: Tensor) -> Tensor:
        kind = type(self.tuner).__module__.split(".")[-2]
        if kind in _NO_TRACE and isinstance(x, FakeTensor):
            return self._imitated(x)
        if kind == "poly":  # a batch of one row, which is of the only task
            rows = x.reshape(1, -1, x.shape[-1])
            said: Tensor = self.tuner(rows, task_ids=torch.zeros(1, dtype=torch.int64, device=x.device))
            return said.view(*x.shape[:-1], -1)
        if kind == "ln_tuning":  # norms compute in one dtype
            cast = {name: value.to(x.dtype) for name, value in self.tuner.named_parameters()}
            return torch.func.functional_call(self.tuner, cast, (x,))
        said = self.tuner(x)
        return said

    def _imitated(self, x: Tensor) -> Tensor:
        """For a plan, which has shapes and no values: a change of the whole map, which is no less work than theirs."""
        weight: Tensor | None = base_parameter(self.port.base)
        bias = base_parameter(self.port.base, "bias")
        assert weight is not None
        for value in self.trained().values():
            weight = weight + value.sum()
        return nn.functional.linear(x, weight if port_kind(self.port.base) == "linear" else weight.T, bias)

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output with the delta in it, which an embedding's own factor is in already."""
        return super().added(x, y)


def attach(method: Peft, loaded: Loaded, name: str, seed: int) -> Adapter:
    """As `Peft.attach`."""
    return _attach(method, method.config, loaded, name, seed)


def whole_of(adapter: Adapter) -> Any:
    """peft's model around the skeleton of an adapter."""
    layer = adapter.inserts()[0][2]
    assert isinstance(layer, Layer)
    return layer.whole


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `peft_bridge.written`."""
    whole = whole_of(adapter)
    settings = as_json(whole.peft_config[NAME])
    # the modules themselves: a pattern or a family's default may mean others elsewhere
    stands = [port.path for port, _, layer in adapter.inserts() if not _follows(layer)]
    settings |= {"target_modules": stands, "tunesmith_seed": adapter.seed}
    # layers that share a tensor have it each under a name of their own
    return settings, {key: value.clone() for key, value in _tensors(whole).items()}


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """As `peft_bridge.read`."""
    from tunesmith.adapt.store import fits

    method = method_of(settings, own)
    adapter = _attach(method, stored(settings), loaded, name, seed_of(settings, where))
    whole = whole_of(adapter)
    try:
        fits({path: tuple(value.shape) for path, value in _tensors(whole).items()}, tensors, where)
        with as_config_error(method.type), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.set_peft_model_state_dict(whole, tensors, NAME)
    except (AdapterError, ConfigError):
        adapter.detach()
        raise
    _own(adapter)  # ranks that were given away change shapes
    return adapter


def _attach(method: Peft, config: Mapping[str, Any], loaded: Loaded, name: str, seed: int) -> Adapter:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.targets import Target

    whole, made_layers = _wrapped(method.type, config, loaded, seed)
    adapter = Adapter(name, method, loaded)
    adapter.seed = seed
    for path, layer in made_layers.items():
        adapter.add(Target(path, method.type.lower()), Layer(method, layer, whole))
    first = adapter.inserts()[0][2]
    assert isinstance(first, Layer)
    for key, child in whole.base_model.named_children():
        if key != "model":
            first.shared.add_module(key, child)
    _own(adapter)
    if method.type == "ADALORA":
        from tunesmith.adapt import peft_adalora

        adapter.memory = peft_adalora.memory(whole)
    return adapter.close()


def _wrapped(kind: str, config: Mapping[str, Any], loaded: Loaded, seed: int) -> tuple[Any, dict[str, Any]]:
    """peft's model around a skeleton, and its layers by the name of the module that each stands for."""
    settings = made(kind, config, loaded)
    skeleton = _skeleton(loaded.model, kind in _LOOK)
    with (
        torch.random.fork_rng(),
        warnings.catch_warnings(),
        as_base(*swaps(loaded.model)),  # another adapter's copies are not the base
        as_config_error(kind),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_for(seed, "init", "peft"))
        whole = peft.PeftModel(skeleton, settings, NAME)
    found = {path: module for path, module in skeleton.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        raise ConfigError("the settings put no layer anywhere", where="method.config")
    if any(path.endswith(".base_layer") for path in found):
        raise ConfigError("the settings put two layers at one module", where="method.config.target_modules")
    for path, layer in found.items():
        _unhook(layer, loaded.model.get_submodule(path))
    return whole, found


class _Skeleton(nn.Module):
    """A tree of empty modules that holds the maps, embeddings and norms of a model, without ports, at their names."""

    is_gradient_checkpointing = False  # or peft would put a hook on the embedding

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = deepcopy(model.config)  # peft writes into it
        self._tied_weights_keys = getattr(model, "_tied_weights_keys", None)
        self._ends = [self._path(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings")]

    def get_input_embeddings(self) -> Any:
        return self.get_submodule(self._ends[0]) if self._ends[0] else None

    def get_output_embeddings(self) -> Any:
        return self.get_submodule(self._ends[1]) if self._ends[1] else None

    @staticmethod
    def _path(model: Any, getter: str) -> str:
        wanted = getattr(model, getter, lambda: None)()
        return next((path for path, module in model.named_modules() if module is wanted), "")


def _skeleton(model: nn.Module, looks: bool) -> nn.Module:
    root = _Skeleton(model)
    drawn: dict[tuple[int, int], nn.Parameter] = {}
    added = tuple(f"{port.path}.{INSERTS}." for port in ports(model))  # other adapters' maps are not the model's
    for path, module in model.named_modules():
        bare = module.base if isinstance(module, Port) else module
        if port_kind(bare) is None or path.startswith(added):
            continue
        if looks and isinstance(bare, nn.Linear) and bare.weight.is_meta:
            bare = _stand_in(bare, drawn)
        place: nn.Module = root
        *parents, leaf = path.split(".")
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(leaf, bare)
    return root


def _stand_in(module: nn.Linear, drawn: dict[tuple[int, int], nn.Parameter]) -> nn.Linear:
    """A map of the same shape that has values; one table of them for each shape."""
    shape = (module.out_features, module.in_features)
    if shape not in drawn:
        draw = torch.Generator().manual_seed(0)
        drawn[shape] = nn.Parameter(torch.randn(*shape, generator=draw), requires_grad=False)
    made_map = nn.Linear(shape[1], shape[0], bias=module.bias is not None)
    made_map.weight = drawn[shape]
    return made_map


def _unhook(layer: Any, module: nn.Module) -> None:
    """Takes the wrapped module out of a layer's submodules."""
    del layer._modules["base_layer"]
    bare = module.base if isinstance(module, Port) else module
    layer.__dict__["base_layer"] = bare  # found as an attribute, and no submodule
    weight = getattr(bare, "weight", None)
    if weight is not None and weight.is_meta:
        layer.to("meta")


def _follows(layer: Any) -> bool:
    """Whether peft puts a layer there by itself, because a weight is tied."""
    return getattr(layer.tuner, "tied_adapter", None) is not None


def _own(adapter: Adapter) -> None:
    """Gives each tensor that trains to the first layer that has it, in float32."""
    seen: set[int] = set()
    for _, _, layer in adapter.inserts():
        assert isinstance(layer, Layer)
        fixed = {
            id(value)
            for key in getattr(layer.tuner, "other_param_names", ())
            if isinstance(held := getattr(layer.tuner, key, None), nn.Module)
            for value in held.parameters()
        }
        layer.owned = set()
        for path, value in layer.named_parameters():
            value.data = value.data.float()
            if id(value) in fixed:
                value.requires_grad_(False)
            elif value.requires_grad and id(value) not in seen:
                seen.add(id(value))
                layer.owned.add(path)


def _tensors(whole: Any) -> dict[str, Tensor]:
    """What peft stores, by its names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, Tensor] = peft.get_peft_model_state_dict(whole, adapter_name=NAME, save_embedding_layers=False)
    return found
