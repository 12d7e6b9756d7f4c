"""What a method is: a frozen section of the configuration that can attach itself to a model.

The one idea: `LoRA(rank=8)` is both the YAML section and the object that acts. A method says which numbers may change
and, where it has inserts, what they add; freezing, naming, counting, saving and removing are written once, here and
in `adapter.py`. One method a file; the table is in `methods.py`. Importing this needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.core.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.models.ports import Insert


class Method(Section):
    """Which numbers of a model may change.

    Attributes:
        kind: name in the table.
    """

    kind: str

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts a fresh adapter on a model and freezes everything else. Works on the meta device.

        Args:
            name: letters, digits, `_` and `-`; unique on the model.
            seed: initial values depend on it and on module names alone.

        Raises:
            ConfigError: the settings do not fit the model.
            AdapterError: the name is taken.
        """
        raise NotImplementedError

    def check(self, config: dict[str, Any]) -> None:
        """Finds settings that cannot fit a model, from its config.json alone, without torch. Raises ConfigError."""

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """What an insert adds to the output features of its role."""
        raise NotImplementedError

    def weight(self, insert: Insert) -> Tensor | None:
        """The same as a change of weights, float32 [output features, input features]; None where it is none."""
        return None
