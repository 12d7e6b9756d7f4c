"""Trained copies of base parameters: which tensor a module computes with, by route.

The one idea: a copy takes the place of the base's parameter under the base's name, so that counting, moving and saving
need to know nothing of it; a forward pass on a route without its adapter swaps the base's tensor in for as long as the
module runs. So the base is always there, tied as it was, and adapters with copies can be switched like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.ports import Port, attached_to, gathered, port_kind
from tunesmith.models.route import Attached

if TYPE_CHECKING:
    from tunesmith.models.targets import Rows

_WAS_TIED = "_tunesmith_was_tied"


def put_copy(model: nn.Module, adapter: str, paths: Sequence[str], copy: nn.Parameter) -> dict[str, nn.Parameter]:
    """Puts an adapter's copy at some places, which share it then. Answers what the base has there."""
    found = {}
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        found[path] = _swap_at(_bare(model.get_submodule(owner)), attached_to(model)).put(adapter, leaf, copy)
    _tell_ties(model)
    return found


def drop_copies(model: nn.Module, adapter: str) -> None:
    """Takes an adapter's copies away; where there are no others, the module is what it was."""
    for swap in swaps(model):
        swap.drop(adapter)
    _tell_ties(model)


def settle(model: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """Puts into the tables what some adapters compute with, and answers what puts back what was there.

    Raises:
        AdapterError: two of them have copies of one parameter.
    """
    wanted = [(swap, swap.of(names)) for swap in swaps(model)]
    old = [(swap, swap.settle(owners)) for swap, owners in wanted]
    _tell_ties(model)

    def undo() -> None:
        for swap, owners in old:
            swap.settle(owners)
        _tell_ties(model)

    return undo


def copies(model: nn.Module) -> list[nn.Parameter]:
    """All copies that adapters have on a model."""
    return [copy for swap in swaps(model) for held in swap.copies.values() for copy in held.values()]


def swaps(model: nn.Module) -> list[Swap]:
    """Everything of a model that has copies, in its order."""
    found = (swap_of(module) for module in model.modules())
    return [swap for swap in found if swap is not None]


def swap_of(module: nn.Module) -> Swap | None:
    """What chooses a module's parameters by route; None where it has none but the base's."""
    found = _bare(module).__dict__.get("forward")
    return found if isinstance(found, Swap) else None


def base_parameter(module: nn.Module, leaf: str = "weight") -> nn.Parameter | None:
    """The base's own parameter of a module, whatever stands in its place."""
    swap = swap_of(module)
    return swap.base[leaf] if swap is not None and leaf in swap.base else module._parameters.get(leaf)


def base_matrix(module: nn.Module, rows: Rows | None = None) -> Tensor:
    """The base's weight of a map, or of some of its features: [outputs, inputs]; of an embedding, [width, ids]."""
    weight = base_parameter(module)
    assert weight is not None
    held = weight.detach()
    held = held if port_kind(module) == "linear" else held.T
    return held if rows is None else gathered(held.T, rows).T


def sharing(model: nn.Module, path: str) -> list[str]:
    """The names of the base parameter at `path`: several where weights are tied. The first is `path`."""
    wanted = _base_places(model)
    return [path, *(other for other, held in wanted.items() if held is wanted[path] and other != path)]


class Swap:
    """The forward of a module that holds copies.

    Attributes:
        base: the base's parameters, by the last part of their names, where there are copies.
        copies: by adapter and name.
        standing: whose copy is in the module's table, by name; None for the base's.
    """

    def __init__(self, module: nn.Module, attached: Attached) -> None:
        self.module, self.attached = module, attached
        self.base: dict[str, nn.Parameter] = {}
        self.copies: dict[str, dict[str, nn.Parameter]] = {}
        self.standing: dict[str, str | None] = {}
        self.plain = module.forward
        module.__dict__["forward"] = self

    def put(self, adapter: str, leaf: str, copy: nn.Parameter) -> nn.Parameter:
        """Puts a copy into the table and answers the base's parameter."""
        held = self.module._parameters[leaf]
        assert held is not None
        self.base.setdefault(leaf, held)
        self.copies.setdefault(adapter, {})[leaf] = copy
        self.settle({leaf: adapter})
        return self.base[leaf]

    def drop(self, adapter: str) -> None:
        """Forgets an adapter's copies."""
        for leaf in self.copies.pop(adapter, {}):
            others = [name for name, copies in self.copies.items() if leaf in copies]
            self.settle({leaf: others[-1] if others else None})
        if not self.copies:
            self.module.__dict__.pop("forward", None)

    def settle(self, wanted: dict[str, str | None]) -> dict[str, str | None]:
        """Puts parameters into the table, by the adapter they are of, and answers whose were there."""
        old = {leaf: self.standing.get(leaf) for leaf in wanted}
        for leaf, adapter in wanted.items():
            held = self.base[leaf] if adapter is None else self.copies[adapter][leaf]
            self.module._parameters[leaf] = held
            self.standing[leaf] = adapter
        return old

    def of(self, names: Sequence[str]) -> dict[str, str | None]:
        """Whose parameters act when some adapters do. Raises AdapterError when two have copies of one."""
        found: dict[str, str | None] = {}
        for leaf in self.base:
            owners = [name for name in names if leaf in self.copies.get(name, {})]
            if len(owners) > 1:
                told = f"{' and '.join(owners)} have trained copies of one base parameter, and only one can stand there"
                raise AdapterError(told, hint="let one of them act at a time")
            found[leaf] = owners[0] if owners else None
        return found

    def is_settled(self) -> bool:
        """Whether the table holds what acts in this forward pass."""
        return self._wanted() == self.standing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wanted = self._wanted()
        # asked by owner: planning puts stand-ins of the tensors into the table
        if wanted == self.standing:
            return self.plain(*args, **kwargs)
        old = self.settle(wanted)
        try:
            return self.plain(*args, **kwargs)
        finally:
            self.settle(old)

    def _wanted(self) -> dict[str, str | None]:
        if self.attached.merged:
            return self.standing
        shares = self.attached.shares()
        for share in shares:
            rows = getattr(share, "rows", None)
            if share.adapter in self.copies and rows is not None and len(rows) < share.count:
                told = f"{share.adapter} trains copies of base parameters and cannot act on some rows of a batch only"
                raise AdapterError(told, hint="give its rows a batch of their own")
        return self.of([share.adapter for share in shares])


def _swap_at(module: nn.Module, attached: Attached) -> Swap:
    return swap_of(module) or Swap(module, attached)


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, Port) else module


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, held in module._parameters.items():
            if held is not None:
                yield f"{path}.{leaf}" if path else leaf, module, leaf


def _base_places(model: nn.Module) -> dict[str, nn.Parameter | None]:
    return {path: base_parameter(module, leaf) for path, module, leaf in _places(model)}


def _tell_ties(model: nn.Module) -> None:
    """Keeps the config true: what is saved now is tied only where the tables share what the base shares."""
    config: Any = getattr(model, "config", None)
    was_tied = model.__dict__.setdefault(_WAS_TIED, getattr(config, "tie_word_embeddings", None))
    if was_tied:
        groups: dict[int, set[int]] = {}
        for _, module, leaf in _places(model):
            groups.setdefault(id(base_parameter(module, leaf)), set()).add(id(module._parameters[leaf]))
        config.tie_word_embeddings = all(len(group) == 1 for group in groups.values())
