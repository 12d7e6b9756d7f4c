"""Any tuner of the peft library, as a method like our own.

The one idea: peft puts its layers into a skeleton that has the model's modules at the model's names, and each layer
becomes an insert at our port; what it puts before a text becomes soft tokens or keys. So the model is never rebuilt,
the base is a route, rows of a batch may differ, and files are peft's own. peft is an extra, and is imported only when
a run asks for it. What is done where: `peft_layers.py`, `peft_encoders.py`, `peft_adalora.py`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded

# those that a test trains, saves and gives back to peft: layers that stand for a module of the model,
LAYERS = (
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
# and what stands before a text
ENCODERS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING")
TYPES = tuple(sorted(LAYERS + ENCODERS))
# what we write ourselves, by the kind that it is here
OWN = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix_layer"}
# what cannot stand beside a model whose rows have adapters of their own: why, and what to use instead
REFUSED = {
    "ADAMSS": ("how many parameters it has is known only once scikit-learn has clustered the weights", "OSF or PSOFT"),
    "ADAPTION_PROMPT": ("it rewrites the attention of llama, mistral and gpt2 themselves", "CARTRIDGE"),
    "LILY": ("its router averages over all tokens of a batch, so that rows change each other's answers", "POLY"),
    "SHADOW": ("it wraps whole blocks around a second decoder, which is no change of a module", "kind: adapter"),
    "XLORA": ("it mixes LoRA adapters that exist already, from folders", "kind: lora, and `combine`"),
}


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

    @property
    def positions(self) -> int:
        """One for each vector or key before a text."""
        if self.type not in ENCODERS:
            return 0
        found = self.config.get("num_virtual_tokens", len(self.config.get("cpt_token_ids") or [0]))
        return found if isinstance(found, int) else 0

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a type that is not bridged, or where peft is not installed."""
        if self.type in OWN:
            told = f"{self.type} is written here: {OWN[self.type]}"
            raise ConfigError(told, where="method.type", hint=f"kind: {OWN[self.type]}")
        if self.type in REFUSED:
            why, instead = REFUSED[self.type]
            raise ConfigError(f"{self.type} is not bridged: {why}", where="method.type", hint=f"instead: {instead}")
        if self.type not in TYPES:
            raise ConfigError(
                f"peft has no {self.type!r} that is bridged; there are {' '.join(TYPES)}",
                where="method.type",
                hint=did_you_mean(self.type, TYPES),
            )
        if find_spec("peft") is None:
            raise ConfigError("peft is not installed", where="method.kind", hint="pip install 'tunesmith[peft]'")

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts an insert wherever peft puts a layer, or vectors or keys before every text.

        Raises:
            ConfigError: peft is not there, or refuses the settings or the model.
            AdapterError: the name is taken.
        """
        self.check({})
        adapter: Adapter = _made_by(self.type).attach(self, loaded, name, seed)
        return adapter

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """What peft's layer answers, less what the base module does, in the dtype of y."""
        from tunesmith.adapt.peft_layers import Layer

        assert isinstance(insert, Layer)
        return insert.change(x).to(y.dtype)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """What ADALORA adds to the loss."""
        if self.type != "ADALORA":
            return None
        from tunesmith.adapt import peft_adalora

        return peft_adalora.penalty(adapter)

    def after_step(self, adapter: Adapter, step: int, total_steps: int) -> None:
        """What ADALORA does with ranks, and CPT with the norm of its vectors."""
        if self.type == "ADALORA":
            from tunesmith.adapt import peft_adalora

            peft_adalora.after_step(adapter, step, total_steps)
        elif self.type == "CPT":
            from tunesmith.adapt import peft_encoders

            peft_encoders.project(adapter)


# its files, for the table in `store.py`


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of an adapter as peft wants them."""
    assert isinstance(adapter.method, Peft)
    found: tuple[dict[str, Any], dict[str, Tensor]] = _made_by(adapter.method.type).written(adapter)
    return found


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """An adapter from peft's settings and tensors; `own` is the method where tunesmith wrote them.

    Raises:
        AdapterError: tensors do not fit. ConfigError: peft is not there, or refuses the settings.
    """
    kind = str(settings["peft_type"])
    Peft(type=kind).check({})
    adapter: Adapter = _made_by(kind).read(loaded, settings, tensors, name, where, own)
    return adapter


def _made_by(kind: str) -> Any:
    return import_module(f"tunesmith.adapt.peft_{'encoders' if kind in ENCODERS else 'layers'}")
