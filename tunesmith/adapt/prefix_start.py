"""How a layer prefix begins: as keys and values of words the model reads, or made by a small trained map.

The map is shared up to its last layer: a table [length, width] through a linear map and tanh gives what the last
layer, one for keys and one for values of each block, turns into states (Li and Liang 2021, arXiv 2101.00190, section
4.3). Everything is float32 and drawn on the CPU from (seed, place) alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.method import Method
from tunesmith.adapt.start import filled, uniform
from tunesmith.core.rng import torch_generator
from tunesmith.models import attention
from tunesmith.models.inserts import Insert, Keys
from tunesmith.models.modes import evaluating
from tunesmith.models.ports import Port
from tunesmith.models.prefixes import held_keys
from tunesmith.models.route import BASE
from tunesmith.models.targets import Target, output_features

if TYPE_CHECKING:
    from tunesmith.adapt.prefix_layer import PrefixLayer
    from tunesmith.models.load import Loaded

# width of the map's middle, as in the paper's experiments on tables
_MIDDLE = 512
_ROLE = "prefix"


def features(model: nn.Module, target: Target) -> int:
    """Numbers in the keys, or values, of one token."""
    module = model.get_submodule(target.path)
    return target.rows.count if target.rows is not None else output_features(module)


def attach_empty(method: PrefixLayer, loaded: Loaded, name: str) -> Adapter:
    """A prefix of zeros, to be filled. Raises ConfigError where the model cannot have one."""
    _prepare(method, loaded)
    return Method.attach(method, loaded, name)


def read_words(adapter: Adapter, length: int, seed: int) -> None:
    """Gives a prefix the keys and values of `length` tokens that are drawn from the vocabulary."""
    loaded = adapter.loaded
    model: Any = loaded.model
    if model.device.type == "meta":
        return
    draw = torch_generator(seed, "init", "prefix")
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, length), generator=draw)
    first = int(loaded.config.pad_token_id) + 1 if loaded.family.pad_offset else 0
    inputs = {"input_ids": ids, "position_ids": torch.arange(first, first + length)[None]}
    flags = {"use_cache": False} if loaded.family.kind == "decoder" else {}

    def hear(module: nn.Module, key: Tensor, value: Tensor) -> None:
        for port in module.children():
            for role, insert in held_keys(port, adapter.name).items() if isinstance(port, Port) else ():
                states = (key if role == "k" else value)[0]  # heads tokens width
                insert["vectors"].copy_(states.transpose(0, 1).flatten(1))

    with torch.no_grad(), evaluating(model), BASE.enter(), attention.hearing(hear):
        model.base_model(**{name: value.to(model.device) for name, value in inputs.items()}, **flags)


def attach_made(method: PrefixLayer, loaded: Loaded, name: str, seed: int) -> Adapter:
    """A prefix whose keys and values come from a trained map."""
    _prepare(method, loaded)
    model, targets = loaded.model, method.places(loaded)
    trunk = _trunk(method, model, Target(targets[0].path, _ROLE), seed)
    adapter = Adapter(name, method, loaded)
    adapter.add(Target(targets[0].path, _ROLE), trunk)
    for target in targets:
        size = features(model, target)
        made = {
            "weight": uniform(model, target, size, _MIDDLE, bound=_MIDDLE**-0.5, seed=seed),
            "bias": filled(model, target, size),
        }
        adapter.add(target, Made(method, made, method.length, trunk))
    return adapter.close()


class Trunk(Insert):
    """The part of the map that all blocks share; it stands at the first of them and adds nothing there."""

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output as it is."""
        return y

    def middle(self) -> Tensor:
        """What the last layers read: [length, middle]."""
        return torch.tanh(nn.functional.linear(self["table"], self["weight"], self["bias"]))


class Made(Keys):
    """Keys or values of one block, made from the trunk.

    Attributes:
        trunk: in a tuple, so that it is no submodule.
    """

    def __init__(self, method: PrefixLayer, parameters: dict[str, nn.Parameter], length: int, trunk: Trunk) -> None:
        super().__init__(method, parameters, length)
        self.trunk = (trunk,)

    def states(self) -> Tensor:
        """[length, keys or values of a token]."""
        return nn.functional.linear(self.trunk[0].middle(), self["weight"], self["bias"])


def _prepare(method: PrefixLayer, loaded: Loaded) -> None:
    method.check(loaded.config.to_dict())
    attention.use(loaded.model)  # nothing else looks for keys and values from outside


def _trunk(method: PrefixLayer, model: nn.Module, target: Target, seed: int) -> Trunk:
    width = output_features(model.get_input_embeddings())  # type: ignore[operator]
    table = uniform(model, Target(target.path, "table"), method.length, width, bound=3**0.5, seed=seed)  # variance 1
    weight = uniform(model, target, _MIDDLE, width, bound=width**-0.5, seed=seed)
    return Trunk(method, {"table": table, "weight": weight, "bias": filled(model, target, _MIDDLE)}, None, 1.0)
