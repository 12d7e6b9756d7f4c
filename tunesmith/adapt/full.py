"""Full fine-tuning: every parameter of the model trains, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tunesmith.adapt.method import Method

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded


class Full(Method):
    """Trains everything; tied weights train as one. The base is gone afterwards: load it again to compare."""

    trains_all: ClassVar[bool] = True
    kind: Literal["full"] = "full"

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Unfreezes every parameter. Raises AdapterError when another adapter is attached."""
        from tunesmith.adapt.adapter import Adapter

        adapter = Adapter(name, self, loaded)
        adapter.train_in_place()
        return adapter.close()
