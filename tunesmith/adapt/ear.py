"""An insert that changes nothing and remembers what its map reads, for an insert further on in the same block.

The one idea: what is heard is handed over within one pass over the block and in the order of the rows that it is of,
so that recomputation, rows of other adapters and several adapters at once come out right. Nothing is kept.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.core.errors import AdapterError
from tunesmith.models.inserts import Insert
from tunesmith.models.route import Route, current_route


class Ear(Insert):
    """Stands at the map whose input is wanted."""

    _heard: tuple[Tensor, ...] = ()
    _told = False
    _route: Route | None = None

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output as it is."""
        route = current_route()
        # of a pass that was broken off: handing over has begun, or all was heard, or the route was another
        if self._told or len(self._heard) >= self._times() or self._route != route:
            self._heard = ()
        self._heard, self._told, self._route = (*self._heard, x), False, route
        return y

    def take(self) -> Tensor:
        """What was heard first and not yet taken."""
        if not self._heard:
            raise AdapterError(f"{self.method.kind}: the block ran in an order that is not known here")
        first, *rest = self._heard
        self._heard, self._told = tuple(rest), True
        return first

    def _times(self) -> int:
        """How often it hears in one pass: rows may have it alone and with others."""
        shares = self.port.attached.shares()
        return sum(insert is self for share in shares for insert in self.port.of(share.adapter))


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
