"""One method put on one model: its trainable parameters, its route, its way off again.

The one idea: whatever a method is, its adapter answers the same few questions. Files are `store.py`, folding into the
weights is `merge.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.kernels.quantized import Quantized
from tunesmith.models.copies import base_parameter, copies, drop_copies, put_copy
from tunesmith.models.heads import PREFIX, attach_head
from tunesmith.models.ports import attached_to, freeze, install, ports, remove
from tunesmith.models.route import BASE, Route

if TYPE_CHECKING:
    from tunesmith.adapt.method import Method, Phase
    from tunesmith.models.heads import Head
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.ports import Port
    from tunesmith.models.targets import Target

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Adapter:
    """A method at work on a model.

    Attributes:
        name: unique on the model.
        method: the section that made it.
        loaded: the model it is on.
        trained: base parameters that it trains, or its copies of them, by path.
        replaced: the base's own parameter at every place where it has a copy.
        lr_factors: parameters that learn at another rate: name to what the learning rate is multiplied by.
        phases: parts of a run in which different parameters train; none is one for all.
        seed: what its method draws from it must be drawn again when it is loaded; saved with it.
        head: its prediction head, where the model is to predict.
        memory: what its method remembers from step to step, by name; saved in checkpoints, and nowhere else.
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
        self.phases: tuple[Phase, ...] = ()
        self.seed = 0
        self.head: Head | None = None
        self.lr_factors: dict[str, float] = {}
        self.memory: dict[str, Tensor] = {}
        freeze(loaded.model)
        for copy in copies(loaded.model):
            copy.requires_grad_(True)  # another adapter's, as its inserts are left alone

    # what it is made of

    def add(self, target: Target, insert: Insert) -> None:
        """Puts an insert at a target."""
        install(self.loaded.model, target).put(self.name, target.role, insert)

    def train_copy(self, *paths: str) -> None:
        """Trains a base parameter through a copy that takes its place on this adapter's route.

        A weight that the base shares between places is untied: the copy stands at the paths given and the base's own
        weight at the others. Several paths, which share one parameter, share one copy.
        """
        module = self.loaded.model.get_submodule(paths[0].rpartition(".")[0])
        old = base_parameter(module, paths[0].rpartition(".")[2])
        assert old is not None
        copy = self.trained[paths[0]] = nn.Parameter(old.detach().clone())  # of codes a clone is their numbers
        self.replaced |= put_copy(self.loaded.model, attached_to(self.loaded.model), self.name, paths, copy)

    def train_in_place(self) -> None:
        """Trains every parameter of the model itself.

        Raises AdapterError when another adapter is attached, or weights are held as codes.
        """
        others = attached_to(self.loaded.model).names
        if others:
            told = f"{self.method.kind} changes the base below the adapter {others[0]}"
            raise AdapterError(told, hint="detach it first")
        for path, parameter in self.loaded.model.named_parameters():
            if isinstance(parameter, Quantized):
                told = f"{self.method.kind} trains every weight; {parameter.kind} is for weights that are frozen"
                raise AdapterError(told, where="precision.base", hint="set it to same, or method to lora")
            parameter.requires_grad_(True)
            self.trained[path] = parameter

    def close(self) -> Adapter:
        """Makes the adapter known to the model, with a prediction head where it is to have one; the last step."""
        self.head = attach_head(self.loaded, self.name)
        if self._is_routed():
            attached_to(self.loaded.model).names.append(self.name)
        return self

    # what training asks

    def penalty(self) -> Tensor | None:
        """What its method adds to the loss of a step; None for nothing."""
        return self.method.penalty(self)

    def after_step(self, step: int, total_steps: int) -> None:
        """What its method does after a step."""
        self.method.after_step(self, step, total_steps)

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
        found = self.changes
        if self.head is not None:
            found |= {PREFIX + name: value for name, value in self.head.named_parameters()}
        return dict(sorted(found.items()))

    @property
    def changes(self) -> dict[str, nn.Parameter]:
        """The same without the prediction head."""
        found = dict(self.trained)
        for port, role, insert in self.inserts():
            found |= {f"{port.path}.{role}.{name}": value for name, value in insert.trained().items()}
        return dict(sorted(found.items()))

    @property
    def route(self) -> Route:
        """The route on which it acts: itself, or the base for a method that changes the model itself."""
        return Route((self.name,)) if self._is_routed() else BASE

    def detach(self) -> None:
        """Takes it off; the base model is, module for module and bit for bit, what it was.

        Raises:
            AdapterError: it trains the base in place, or is merged.
        """
        model = self.loaded.model
        if attached_to(model).merged:
            raise AdapterError(f"{self.name} is merged into the weights", hint="unmerge first")
        if self._is_in_place():
            raise AdapterError(f"{self.method.kind} has changed the model itself", hint="load the base again")
        remove(model, self.name)
        attached_to(model).heads.pop(self.name, None)
        drop_copies(model, self.name)
        self.trained, self.replaced, self.head = {}, {}, None

    def _is_routed(self) -> bool:
        # a head over the untouched base is an adapter like any other: rows of a batch may have different ones
        return not self._is_in_place() and bool(self.inserts() or self.replaced or self.head is not None)

    def _is_in_place(self) -> bool:
        return not self.trained.keys() <= self.replaced.keys()

    def save(self, folder: Path | str) -> Path:
        """Writes `adapter/` or `model/` within a run folder and answers which."""
        from tunesmith.adapt.store import save_run

        return save_run(self, Path(folder))
