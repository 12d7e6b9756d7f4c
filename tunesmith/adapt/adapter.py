"""One method put on one model: its trainable parameters, its route, its way off again.

The one idea: whatever a method is, its adapter answers the same few questions. Files are `store.py`, folding into the
weights is `merge.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.ports import attached_to, freeze, install, ports, remove
from tunesmith.models.route import BASE, Route

if TYPE_CHECKING:
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded
    from tunesmith.models.ports import Insert, Port
    from tunesmith.models.targets import Target

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Adapter:
    """A method at work on a model.

    Attributes:
        name: unique on the model.
        method: the section that made it.
        loaded: the model it is on.
        replaced: base parameters that it trains copies of: path to the parameter that was there.
    """

    def __init__(self, name: str, method: Method, loaded: Loaded) -> None:
        if not _NAME.fullmatch(name):
            raise AdapterError(f"{name!r} is no adapter name: letters, digits, _ and -, at most 64")
        if name in attached_to(loaded.model).names:
            raise AdapterError(f"an adapter {name!r} is attached already")
        if attached_to(loaded.model).merged:
            raise AdapterError("adapters are merged into the weights", hint="unmerge first")
        self.name, self.method, self.loaded = name, method, loaded
        self.trained: dict[str, nn.Parameter] = {}
        self.replaced: dict[str, nn.Parameter] = {}
        freeze(loaded.model)

    # what it is made of

    def add(self, target: Target, insert: Insert) -> None:
        """Puts an insert at a target."""
        install(self.loaded.model, target).put(self.name, target.role, insert)

    def train_copy(self, path: str) -> None:
        """Trains a base parameter through a copy that takes its place, so that `detach` can give it back."""
        owner, _, leaf = path.rpartition(".")
        module = self.loaded.model.get_submodule(owner)
        old = module._parameters[leaf]
        assert old is not None
        self.replaced[path] = old
        module._parameters[leaf] = self.trained[path] = nn.Parameter(old.detach().clone())

    def train_in_place(self) -> None:
        """Trains every parameter of the model itself."""
        for path, parameter in self.loaded.model.named_parameters():
            parameter.requires_grad_(True)
            self.trained[path] = parameter

    def close(self) -> Adapter:
        """Makes the adapter known to the model; the last step of attaching."""
        if self.inserts():
            attached_to(self.loaded.model).names.append(self.name)
        return self

    # what others ask

    def inserts(self) -> list[tuple[Port, str, Insert]]:
        """Port, role and insert at every place where it acts, in the order of the model."""
        return [
            (port, role, insert)
            for port in ports(self.loaded.model)
            if self.name in port.inserts
            for role, insert in port.inserts[self.name].items()  # type: ignore[operator,union-attr]
        ]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name, sorted; each tensor once."""
        found = dict(self.trained)
        for port, role, insert in self.inserts():
            found |= {f"{port.path}.{role}.{name}": value for name, value in insert.named_parameters()}
        return dict(sorted(found.items()))

    @property
    def route(self) -> Route:
        """The route on which it acts: itself, or the base for a method without inserts."""
        return Route((self.name,)) if self.inserts() else BASE

    def detach(self) -> None:
        """Takes it off; the base model is, module for module and bit for bit, what it was.

        Raises:
            AdapterError: it trains the base in place, or is merged.
        """
        model = self.loaded.model
        if attached_to(model).merged:
            raise AdapterError(f"{self.name} is merged into the weights", hint="unmerge first")
        if len(self.trained) != len(self.replaced):
            raise AdapterError(f"{self.method.kind} has changed the model itself", hint="load the base again")
        remove(model, self.name)
        for path, old in self.replaced.items():
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = old
        self.trained, self.replaced = {}, {}

    def save(self, folder: Path | str) -> Path:
        """Writes `adapter/` or `model/` within a run folder and answers which."""
        from tunesmith.adapt.store import save_run

        return save_run(self, Path(folder))
