"""An insert that changes nothing and remembers what its map reads, for an insert further on in the same block.

The one idea: it hears and hands over within one pass over the block, so that recomputation, rows of other adapters
and several adapters at once need no thought: the hearer is always the ear's own partner.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.core.errors import AdapterError
from tunesmith.models.ports import Insert


class Ear(Insert):
    """Stands at the map whose input is wanted."""

    heard: Tensor | None = None

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output as it is."""
        self.heard = x
        return y

    def take(self) -> Tensor:
        """What was heard last; it is not kept, so that no activation outlives its pass."""
        heard, self.heard = self.heard, None
        if heard is None:
            raise AdapterError(f"{self.method.kind}: the block ran in an order that is not known here")
        return heard


class Hearer(Insert):
    """Stands where what was heard is used.

    Attributes:
        ear: its partner, in a tuple, so that it is no submodule.
    """

    ear: tuple[Ear, ...] = ()

    def heard(self) -> Tensor:
        """What its partner heard, taken."""
        (ear,) = self.ear
        return ear.take()
