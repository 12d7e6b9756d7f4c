"""Trained copies of base parameters: which tensor a module computes with, by route and, in a mixed batch, by row.

The one idea: a copy takes the place of the base's parameter under the base's name, so that counting, moving and saving
need to know nothing of it; a forward pass on a route without its adapter swaps the base's tensor in for as long as the
module runs. So the base is always there, tied as it was, and adapters with copies can be switched like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.places import places
from tunesmith.models.route import Attached, Share

_WAS_TIED = "_tunesmith_was_tied"


def put_copy(
    model: nn.Module, attached: Attached, adapter: str, paths: Sequence[str], copy: nn.Parameter
) -> dict[str, nn.Parameter]:
    """Puts an adapter's copy at some places, which share it then. Answers what the base has there."""
    found = {}
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        module = _bare(model.get_submodule(owner))
        found[path] = (swap_of(module) or Swap(module, attached)).put(adapter, leaf, copy)
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


def acting_parameters(module: nn.Module) -> dict[str, nn.Parameter] | None:
    """What a module computes with in this forward pass, by name; None where that differs between rows."""
    swap = swap_of(module)
    if swap is not None:
        return swap.acting()
    return {name: held for name, held in _bare(module)._parameters.items() if held is not None}


def run_base(module: nn.Module, x: Tensor, **instead: Tensor) -> Tensor:
    """What the base's module makes of x, whatever copies stand in it; `instead` takes the place of tensors by name."""
    swap = swap_of(module)
    if swap is not None:
        found: Tensor = swap.run({**swap.base, **instead}, x)
    elif instead:
        found = torch.func.functional_call(module, instead, (x,))
    else:
        found = module(x)
    return found


@contextmanager
def as_base(*held: Swap | None) -> Iterator[None]:
    """Modules as the base has them, for code that reads their tensors or copies them; None holds no copies."""
    old = [(swap, {leaf: swap.module._parameters[leaf] for leaf in swap.base}) for swap in held if swap is not None]
    for swap, _ in old:
        swap.module._parameters.update(swap.base)
        swap.module.__dict__["forward"] = swap.plain
    try:
        yield
    finally:
        for swap, table in old:
            swap.module._parameters.update(table)
            swap.module.__dict__["forward"] = swap


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
            self.module._parameters[leaf] = self._held(leaf, adapter)
            self.standing[leaf] = adapter
        return old

    def acting(self) -> dict[str, nn.Parameter] | None:
        """What the module computes with in this forward pass, by name; None where that differs between rows."""
        shares = self.attached.shares()
        if any(share.rows is not None and len(share.rows) < share.count for share in shares):
            return None
        owners = {} if self.attached.merged else self.of([share.adapter for share in shares])
        found = dict(self.module._parameters)
        # by owner, not by tensor, as in `_under`
        changed = {leaf: owner for leaf, owner in owners.items() if owner != self.standing.get(leaf)}
        found.update({leaf: self._held(leaf, owner) for leaf, owner in changed.items()})
        return {name: held for name, held in found.items() if held is not None}

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

    def run(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module with some tensors in its table for as long as it runs."""
        table: dict[str, Any] = self.module._parameters
        old = {leaf: table[leaf] for leaf in values}
        table.update(values)
        try:
            return self.plain(*args, **kwargs)
        finally:
            table.update(old)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attached.merged:
            return self.plain(*args, **kwargs)
        shares = self.attached.shares()
        if all(share.rows is None or len(share.rows) == share.count for share in shares):
            return self._under([share.adapter for share in shares], *args, **kwargs)
        mine = [share for share in shares if share.adapter in self.copies]
        return self._by_rows(mine, *args, **kwargs) if mine else self._under((), *args, **kwargs)

    def _under(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        owners = self.of(names)
        # by owner, not by tensor: planning puts stand-ins of what stands into the table
        if owners == self.standing:
            return self.plain(*args, **kwargs)
        return self.run({leaf: self._held(leaf, owner) for leaf, owner in owners.items()}, *args, **kwargs)

    def _by_rows(self, shares: Sequence[Share], *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, with that of copies at the rows of their adapters."""
        if len(args) != 1 or kwargs:
            told = f"{shares[0].adapter} trains copies in a {type(self.module).__name__}, which takes all rows at once"
            raise AdapterError(told, hint="give its rows a batch of their own")
        (x,) = args
        y: Tensor = self._under((), x)
        for rows in dict.fromkeys(share.rows for share in shares):
            group = [share for share in shares if share.rows == rows]
            found = places(group[0], x)
            assert found is not None
            y = y.index_copy(*found, self._under([share.adapter for share in group], x.index_select(*found)))
        return y

    def _held(self, leaf: str, owner: str | None) -> nn.Parameter:
        return self.base[leaf] if owner is None else self.copies[owner][leaf]


def _bare(module: nn.Module) -> nn.Module:
    held: nn.Module = module.__dict__.get("_held", (module,))[0]  # a port stands for what it holds
    return held


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
