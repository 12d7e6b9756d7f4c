"""Ports: what takes the place of a linear map, an embedding or a norm so that inserts can act beside it.

The one idea: a port *shares* the parameter and buffer tables of the module it stands for. Base weights keep their
names, tied weights stay tied, whatever replaces a parameter replaces it in both, and taking the port away gives back
the very module that was there. What acts in a forward pass is the route's business (`route.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.core.switches import on
from tunesmith.kernels.build import usable
from tunesmith.kernels.lowrank import LowRank, Map, maps
from tunesmith.kernels.quantized import Quantized
from tunesmith.models.copies import acting_parameters
from tunesmith.models.inserts import Insert, Keys, SoftTokens
from tunesmith.models.mixed import together
from tunesmith.models.places import places
from tunesmith.models.route import Attached
from tunesmith.models.soft import current_holes

if TYPE_CHECKING:
    from tunesmith.models.targets import Target

INSERTS = "inserts"
_NORMS = ("LayerNorm", "RMSNorm")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

PortKind = Literal["linear", "conv1d", "embedding", "norm"]


class Named(nn.ModuleDict):
    """Modules by any name, also one that is an attribute of modules (`type`, `keys`, `weight`)."""

    def put(self, name: str, module: nn.Module) -> None:
        """Adds a module; `add_module` refuses names of attributes."""
        self._modules[name] = module

    def train(self, mode: bool = True) -> Named:
        """As in every module, also where one of the names is `training`."""
        self.__dict__["training"] = mode
        for module in self.children():
            module.train(mode)
        return self

    def drop(self, name: str) -> None:
        """Removes a module."""
        del self._modules[name]


class Port(nn.Module):
    """Stands where `base` stood and runs it; `inserts` holds, by adapter and role, what acts beside it."""

    def __init__(self, base: nn.Module, path: str, attached: Attached) -> None:
        super().__init__()
        # the same tables, not copies: a parameter that is replaced, moved or tied is so for both
        self._parameters = base._parameters
        self._buffers = base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        # in a tuple, so that it is no submodule and base names stay as they are
        self._held = (base,)
        self.path, self.attached = path, attached
        self.training = base.training
        self.inserts = Named()

    @property
    def base(self) -> nn.Module:
        """The module that was here."""
        return self._held[0]

    def __getattr__(self, name: str) -> Any:
        # code that reads `in_features`, `nf` or `embed_scale` finds them
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)

    def acting(self) -> Iterator[Insert]:
        """The inserts that act here in this forward pass."""
        for share in self.attached.shares():
            yield from self.of(share.adapter)

    def of(self, adapter: str) -> list[Insert]:
        """The inserts of one adapter here."""
        return list(self.inserts[adapter].values()) if adapter in self.inserts else []  # type: ignore[operator,arg-type]

    def put(self, adapter: str, role: str, insert: Insert) -> None:
        """Adds an insert."""
        if adapter not in self.inserts:
            self.inserts.put(adapter, Named())
        self.inserts[adapter].put(role, insert)  # type: ignore[operator]
        insert.__dict__["port"] = self  # not as a submodule: it is what holds the insert
        if isinstance(insert, SoftTokens):
            self.attached.soft[adapter] = insert
        elif isinstance(insert, Keys):
            self.attached.keys[adapter] = insert.length
        self.inserts.train(self.training)  # new modules train by default: dropout would act in evaluation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]; for an embedding, ids [...] to [..., width]."""
        return self.changed(x, self.base(x))

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """What the base module made of x, with all that acts here."""
        shares = self.attached.shares()
        # asked only where something acts: a merged adapter should cost nothing
        factor = getattr(self.base, "embed_scale", None) if shares else None
        for share in shares:
            for insert in self.of(share.adapter):
                found = places(share, x)
                if found is None:
                    y = insert.added(x, y, factor)
                else:
                    part = insert.added(x.index_select(*found), y.index_select(*found), factor)
                    y = y.index_copy(*found, part)
        return y

    def extra_repr(self) -> str:
        return f"{type(self.base).__name__}, {', '.join(self.inserts) or 'empty'}"


class LinearPort(Port):
    """A port at an nn.Linear or at GPT-2's Conv1D, which keeps its weight input-major."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]; low-rank changes have a backward of their own, or act on all rows together."""
        weight = self._parameters["weight"]
        # codes become numbers where x is
        held, is_all = as_map(self) if usable(x, None if isinstance(weight, Quantized) else weight) else (None, False)
        if held is None or not is_all or not held.changes:
            return super().forward(x)
        return maps(x.flatten(0, -2), [held]).unflatten(0, x.shape[:-1])

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """What the base module made of x, with all that acts here; rows with changes of their own together."""
        mixed = together(self, x, y)
        return super().changed(x, y) if mixed is None else mixed


class EmbeddingPort(Port):
    """A port at an embedding. What its inserts add is scaled as the embedding scales its own rows (gemma)."""

    def forward(self, x: Tensor) -> Tensor:
        """ids [...] to [..., width], with soft tokens in the room that was made for them.

        Raises AdapterError where soft tokens act and nobody made room.
        """
        y = super().forward(x)
        soft = {share.adapter: self.soft(share.adapter) for share in self.attached.shares()}
        if not any(soft.values()):
            return y
        holes = current_holes()
        if holes is None:
            raise AdapterError(
                f"{', '.join(name for name in soft if soft[name])}: soft tokens need room in the documents",
                hint="run the model through Policy or generate, which make it",
            )
        if x.shape != holes.shape:
            return y
        for adapter, at, numbers in holes.puts:
            insert = soft.get(adapter)
            if insert is not None:
                vectors = insert["vectors"].to(y.dtype)[numbers]
                y = y.flatten(0, 1).index_put((at,), vectors).view(y.shape)
        return y

    def soft(self, adapter: str) -> SoftTokens | None:
        """An adapter's soft tokens, if they are here."""
        return next((insert for insert in self.of(adapter) if isinstance(insert, SoftTokens)), None)


class NormPort(Port):
    """A port at a normalisation (LayerNorm, or a family's RMSNorm) that has a gain of its own."""


def port_kind(module: nn.Module) -> PortKind | None:
    """What kind of port fits a module; None where none does. A port counts as what it stands for."""
    if isinstance(module, Port):
        module = module.base
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    name = type(module)
    if name.__name__ == "Conv1D" and name.__module__ == "transformers.pytorch_utils":
        return "conv1d"
    # transformers gives each family a class of its own; without a gain there is nothing to change
    return "norm" if name.__name__.endswith(_NORMS) and module._parameters.get("weight") is not None else None


def is_watched(module: nn.Module) -> bool:
    """Whether a hook waits for a module itself to run, so that nothing may be computed in its place."""
    held = vars(module)
    return any(map(held.__getitem__, _HOOKS))


def is_any_watched(model: nn.Module) -> bool:
    """Whether a hook waits for a module of a model, or for modules anywhere, or for what a port stands for.

    Asked anew each time, because nothing tells when a hook comes. What ports hold beside a module is left out: with
    many adapters it is nearly all modules, and it is asked by the port and not called as a module.
    """
    if any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS):
        return True
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if is_watched(module):
            return True
        waiting += (module.base,) if isinstance(module, Port) else vars(module)["_modules"].values()
    return False


def as_map(module: nn.Module) -> tuple[Map | None, bool]:
    """A linear map as it acts now, with low-rank changes, and whether these are all that acts on it.

    Where they are not, the map is the base's, and `Port.changed` puts on what acts. None where the module is no plain
    linear map, or has other weights for some rows.
    """
    base = module.base if isinstance(module, Port) else module
    own = acting_parameters(base) if type(base) is nn.Linear and not is_watched(base) else None
    if own is None:
        return None, False
    changes: list[LowRank] = []
    port = module if isinstance(module, Port) else None
    for share in port.attached.shares() if port is not None else ():
        for insert in port.of(share.adapter) if port is not None else ():
            change = insert.low_rank() if share.rows is None else None
            if change is None or not on("lowrank"):
                return Map(own["weight"], own.get("bias")), False
            changes.append(change)
    return Map(own["weight"], own.get("bias"), tuple(changes)), True


def attached_to(model: nn.Module) -> Attached:
    """The list of a model's adapters, made on first use."""
    found = model.__dict__.get("_tunesmith_attached")
    if found is None:
        found = model.__dict__["_tunesmith_attached"] = Attached()
    return found


def held_by(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model and of the prediction heads that are attached to it."""
    yield from model.parameters()
    for head in attached_to(model).heads.values():
        yield from head.parameters()


def install(model: nn.Module, target: Target) -> Port:
    """The port at a target's path, put there if there is none yet."""
    module = model.get_submodule(target.path)
    if isinstance(module, Port):
        return module
    kind = port_kind(module)
    if kind is None:
        raise AdapterError(f"{target.path} is a {type(module).__name__}, neither a linear map, an embedding nor a norm")
    port = {"embedding": EmbeddingPort, "norm": NormPort}.get(kind, LinearPort)(module, target.path, attached_to(model))
    _replace(model, target.path, port)
    return port


def remove(model: nn.Module, adapter: str) -> None:
    """Takes an adapter's inserts away, and every port that holds none then; the modules that were there return."""
    for port in ports(model):
        if adapter in port.inserts:
            port.inserts.drop(adapter)
        if not len(port.inserts):
            _replace(model, port.path, port.base)
    attached = attached_to(model)
    if adapter in attached.names:
        attached.names.remove(adapter)
    attached.soft.pop(adapter, None)
    attached.keys.pop(adapter, None)


def ports(model: nn.Module) -> list[Port]:
    """All ports of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, Port)]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without inserts: the names and tensors of the base model."""
    held = tuple(f"{port.path}.{INSERTS}." for port in ports(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(held)}


def freeze(model: nn.Module) -> None:
    """Stops gradients for everything but what adapters have added."""
    mine = {id(parameter) for port in ports(model) for parameter in port.inserts.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in mine:
            parameter.requires_grad_(False)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    module.training = owner.training
    owner._modules[leaf] = module
