"""Any tuner of the peft library that stands beside single modules, as a method like our own.

The one idea: peft puts its layers into a skeleton that has the model's modules at the model's names, and each layer
becomes an insert at our port. So the model is never rebuilt, the base is a route, rows of a batch may differ, and
files are peft's own. peft is an extra, and is imported only when a run asks for it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.models.ports import Insert

# those that a test trains, saves and gives back to peft; what we write ourselves is not among them
TYPES = (
    "LOHA", "LOKR", "OFT", "BOFT", "HRA", "HIRA", "FOURIERFT", "WAVEFT", "DELORA", "GRALORA", "C3A", "MISS", "ROAD",
)  # fmt: skip


class Peft(Method):
    """A tuner of the peft library.

    Attributes:
        type: peft's name of it.
        config: the settings of its configuration class, in peft's words.
    """

    # peft's own start: some types (FOURIERFT, C3A) do not begin at the base, and HRA does up to rounding
    identity_at_start: ClassVar[bool] = False

    kind: Literal["peft"] = "peft"
    type: str = "LOHA"
    config: dict[str, Any] = {}

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a type that is not bridged, or where peft is not installed."""
        if self.type not in TYPES:
            raise ConfigError(
                f"{self.type!r} is not bridged; there are {' '.join(TYPES)}",
                where="method.type",
                hint=did_you_mean(self.type, TYPES),
            )
        if find_spec("peft") is None:
            raise ConfigError("peft is not installed", where="method.kind", hint="pip install 'tunesmith[peft]'")

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts an insert wherever peft puts a layer.

        Raises:
            ConfigError: peft is not there, or refuses the settings or the model.
            AdapterError: the name is taken.
        """
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.adapt.peft_layers import Layer, layers
        from tunesmith.models.targets import Target

        self.check({})
        made = layers(loaded, self.type, self.config, seed)
        adapter = Adapter(name, self, loaded)
        adapter.seed = seed
        for path, layer in made.items():
            adapter.add(Target(path, self.type.lower()), Layer(self, layer))
        return adapter.close()

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """What peft's layer answers, less what the base module does, in the dtype of y."""
        from tunesmith.adapt.peft_layers import Layer

        assert isinstance(insert, Layer)
        change: Tensor = insert.tuner(x) - insert.port.base(x)
        return change.to(y.dtype)


# its files, for the table in `store.py`


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of an adapter as peft wants them."""
    from tunesmith.adapt import peft_layers

    return peft_layers.written(adapter)


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """An adapter from peft's settings and tensors; `own` is the method where tunesmith wrote them.

    Raises:
        AdapterError: tensors do not fit. ConfigError: peft is not there, or refuses the settings.
    """
    Peft(type=str(settings["peft_type"])).check({})
    from tunesmith.adapt import peft_layers

    return peft_layers.read(loaded, settings, tensors, name, where, own)
