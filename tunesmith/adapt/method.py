"""What a method is: a frozen section of the configuration that can attach itself to a model.

The one idea: `LoRA(rank=8)` is both the YAML section and the object that acts. A method says which numbers may change
and, where it has inserts, what they add; freezing, naming, counting, saving and removing are written once, here and
in `adapter.py`. One method a file; the table is in `methods.py`. Importing this needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.core.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.kernels.lowrank import LowRank
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


@dataclass(frozen=True)
class Phase:
    """A part of a run in which some of an adapter's parameters train; the next begins with fresh moments.

    Attributes:
        until: the share of all steps that are done when it ends.
        names: what trains, by the names of `Adapter.parameters`; None is all.
    """

    until: float
    names: frozenset[str] | None = None


class Method(Section):
    """Which numbers of a model may change.

    Attributes:
        kind: name in the table.
        identity_at_start: a fresh adapter answers as the base does, bit for bit; soft tokens, which the base has
            never seen, are the exception that says so.
        trains_all: it changes every weight of the model itself.
    """

    identity_at_start: ClassVar[bool] = True
    trains_all: ClassVar[bool] = False

    kind: str

    @property
    def positions(self) -> int:
        """Positions that it takes from every row: a model with a table of them has that many fewer for the text."""
        return 0

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts a fresh adapter on a model and freezes everything else. Works on the meta device.

        As it stands here, it puts `insert` at each of `places`; a method that does more writes its own.

        Args:
            name: letters, digits, `_` and `-`; unique on the model.
            seed: initial values depend on it and on module names alone.

        Raises:
            ConfigError: the settings do not fit the model.
            AdapterError: the name is taken.
        """
        from tunesmith.adapt.adapter import Adapter

        # all made before any is put in: a method that does not fit leaves the model as it was
        made = [(target, self.insert(loaded.model, target, seed)) for target in self.places(loaded)]
        adapter = Adapter(name, self, loaded)
        for target, insert in made:
            adapter.add(target, insert)
        return adapter.close()

    def places(self, loaded: Loaded) -> list[Target]:
        """Where it acts, in the order of the model. Raises ConfigError where that is nowhere."""
        raise NotImplementedError

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """Fresh parameters for a place, float32 on the device of the module that is there."""
        raise NotImplementedError

    def check(self, config: dict[str, Any]) -> None:
        """Finds settings that cannot fit a model, from its config.json alone, without torch. Raises ConfigError."""

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """What an insert adds to the output features of its role."""
        raise NotImplementedError

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """What is added to the loss of a step for the sake of the parameters themselves, once, whatever its units."""
        return None

    def after_step(self, adapter: Adapter, step: int, total_steps: int) -> None:
        """Changes parameters after step `step` (from 1), while the gradients of the step are still there.

        It may depend on nothing but these, the parameters and `Adapter.memory`: a resumed run is then the same run.
        """

    def low_rank(self, insert: Insert) -> LowRank | None:
        """The delta as s B A x with factors of now; None where it is something else, or dropout acts."""
        return None

    def weight(self, insert: Insert) -> Tensor | None:
        """The same as a change of weights, float32 [output features, input features]; None where it is none."""
        return None

    def fold(self, insert: Insert, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What merging adds to weight and bias of the role, float32; both None where the delta is no such change.

        Args:
            weight: of the role, float32 [output features, input features], with what acted before in it.
            bias: float32 [output features], likewise; None where there is none.
        """
        return self.weight(insert), None
