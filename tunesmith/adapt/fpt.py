"""FPT: a frozen transformer whose norms and input and output layers train (Lu et al. 2021, arXiv 2103.05247).

Attention and MLP stay as they are. Everything is trained as what is added to it, from zero, so that the adapted model
is the base at step 0, a tied pair needs no copy of what it shares, and rows of one batch may differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError
from tunesmith.core.section import Names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


class FPT(Method):
    """Frozen pretrained transformer.

    Attributes:
        layers: input and output layers that train besides the norms. A model without a head over the vocabulary, or
            whose output layer is a prediction head, has no `head` here.
    """

    kind: Literal["fpt"] = "fpt"
    layers: Names = ("embed", "head")

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a layer that is neither the input nor the output layer."""
        wrong = [layer for layer in self.layers if layer not in ("embed", "head")]
        if wrong:
            raise ConfigError(f"{wrong[0]!r} is neither embed nor head", where="method.layers")

    def places(self, loaded: Loaded) -> list[Target]:
        """All norms, and the layers that are there."""
        from tunesmith.models.targets import match

        self.check({})
        there = set(loaded.family.roles) - ({"head"} if loaded.predicts is not None else set())
        return match(loaded.model, loaded.family, ["norm", *(layer for layer in self.layers if layer in there)])

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """What is added to a norm's gain and bias, or to the weight of a layer, zero, of their shapes."""
        from tunesmith.adapt.start import filled
        from tunesmith.models.inserts import Insert

        own = dict(model.get_submodule(target.path).named_parameters(recurse=False))
        names = ("weight", "bias") if target.role == "norm" else ("weight",)
        added = {name: filled(model, target, *own[name].shape) for name in names if name in own}
        return Insert(self, added, None, 1.0)

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """The change of the output in the dtype of y. For an embedding, x holds ids."""
        import torch
        from torch.nn.functional import embedding, linear

        from tunesmith.models.ports import port_kind

        kind = port_kind(insert.port)
        if kind == "embedding":
            return embedding(x, insert["weight"]).to(y.dtype)
        if kind == "linear":
            return linear(x, insert["weight"].to(y.dtype))
        # wide, twice, and subtracted: what bfloat16 would round away at a gain of one still acts
        changes = dict(insert.named_parameters())
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        still = insert.rerun(x, **{name: torch.zeros_like(value) for name, value in changes.items()})
        return (insert.rerun(x, **changes) - still).to(y.dtype)
