"""Bottleneck adapters: h + U f(D h), a narrow pair of maps inside each block, trained while the rest stays frozen.

U and its bias start at zero, so that the adapted model is the base at step 0. The four styles differ in where the
pair stands and what it reads; where they do is one table below.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target

# style to the maps at whose outputs it stands
_STANDS = {"houlsby": ("o", "down"), "lin": ("down",), "pfeiffer": ("down",), "parallel": ("up", "down")}
_READS = "up"  # reads what the MLP reads: the parallel style listens there
_EPS = 1e-5


class Bottleneck(Method):
    """Bottleneck adapters.

    Attributes:
        style: houlsby: after attention and after the MLP, each before its residual sum (Houlsby et al. 2019, arXiv
            1902.00751); lin: after the MLP, behind a trained layer norm of its own (Lin et al. 2020, arXiv
            2004.03829); pfeiffer: after the MLP alone (Pfeiffer et al. 2021, arXiv 2005.00247); parallel: beside the
            MLP, reading what it reads (He et al. 2022, arXiv 2110.04366).
        size: numbers between the two maps.
        activation: what acts on them.
        skip_layers: lowest blocks that get none (AdapterDrop, Rueckle et al. 2021, arXiv 2010.11918); of an
            encoder-decoder, of each side.
    """

    kind: Literal["adapter"] = "adapter"
    style: Literal["houlsby", "lin", "pfeiffer", "parallel"] = "houlsby"
    size: int = Field(default=64, ge=1)
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    skip_layers: int = Field(default=0, ge=0)

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError when no block is left."""
        from tunesmith.models.families import setting

        count = setting(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
        if isinstance(count, int):
            self._leaves_some(count)

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts a pair at every place of its style.

        Raises:
            ConfigError: no block is left, or, for the parallel style, its MLP has no single way in and out.
            AdapterError: the name is taken.
        """
        from tunesmith.adapt.ear import Ear, Hearer

        adapter = super().attach(loaded, name, seed)
        inserts = [insert for _, _, insert in adapter.inserts()]
        for ear, hearer in pairwise(inserts):
            if isinstance(ear, Ear) and isinstance(hearer, Hearer):
                hearer.ear = (ear,)
        return adapter

    def places(self, loaded: Loaded) -> list[Target]:
        """The outputs of maps of its style; for the parallel style also where it listens, before each."""
        from tunesmith.models.targets import Target, block_number, match

        family = loaded.family
        found = match(loaded.model, family, _STANDS[self.style], "method.style")
        self._leaves_some(1 + max(block_number(family, target.path) for target in found))
        if self.style == "parallel":
            if [target.role for target in found] != list(_STANDS["parallel"]) * (len(found) // 2):
                told = f"{family.name} has not one {_READS} and one down map a block, which parallel needs"
                raise ConfigError(told, where="method.style", hint="houlsby, lin and pfeiffer do not")
            # all of a fused map: nothing is added there
            found = [Target(target.path, target.role) for target in found]
        return [target for target in found if block_number(family, target.path) >= self.skip_layers]

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """D [size, width] uniform as for a linear map, U [width, size] zero, and their biases, zero."""
        from tunesmith.adapt.ear import Ear, Hearer
        from tunesmith.adapt.start import filled, uniform
        from tunesmith.models.targets import output_features

        if target.role == _READS:
            return Ear(self, {}, None, 1.0)
        width = output_features(model.get_submodule(target.path))
        parts = {
            "D": uniform(model, target, self.size, width, bound=width**-0.5, seed=seed),
            "d": filled(model, target, self.size),
            "U": filled(model, target, width, self.size),
            "u": filled(model, target, width),
        }
        if self.style == "lin":
            parts |= {"gain": filled(model, target, width, value=1.0), "bias": filled(model, target, width)}
        return Hearer(self, parts, None, 1.0)

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """U f(D h + d) + u in the dtype of y: [..., width]; h is y, or what the MLP read."""
        import torch
        from torch.nn import functional

        from tunesmith.adapt.ear import Hearer

        own = {name: value.to(y.dtype) for name, value in insert.named_parameters()}
        h = y
        if self.style == "parallel":
            assert isinstance(insert, Hearer)
            h = insert.heard()
        elif self.style == "lin":
            h = functional.layer_norm(y, y.shape[-1:], own["gain"], own["bias"], _EPS)
        act = torch.tanh if self.activation == "tanh" else getattr(functional, self.activation)
        return functional.linear(act(functional.linear(h, own["D"], own["d"])), own["U"], own["u"])

    def _leaves_some(self, blocks: int) -> None:
        if self.skip_layers >= blocks:
            raise ConfigError(
                f"{self.skip_layers} leaves none of the {blocks} blocks of the model", where="method.skip_layers"
            )
