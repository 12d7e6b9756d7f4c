"""BitFit: biases alone train (Ben Zaken et al. 2021, arXiv 2106.10199).

Each bias is trained as what is added to it, from zero, so that rows of one batch can have biases of their own and the
base stays as it is. Biases of the linear maps within blocks and of all norms count: 12,988,416 for GPT-3 175B.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from tunesmith.adapt.method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target

log = logging.getLogger(__name__)


class BitFit(Method):
    """Trains biases; where a model has none, zero biases at the linear maps of its blocks."""

    kind: Literal["bitfit"] = "bitfit"

    def places(self, loaded: Loaded) -> list[Target]:
        """Every linear map within blocks and every norm that has a bias."""
        from tunesmith.models.targets import linear_maps, match

        maps = linear_maps(loaded.model, loaded.family)
        norms = match(loaded.model, loaded.family, ("norm",), "method.kind")
        found = [target for target in [*maps, *norms] if _bias(loaded.model, target) is not None]
        if found:
            return found
        log.info("%s has no biases: bitfit adds zero biases to the %d maps of its blocks", loaded.name, len(maps))
        return maps

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """What is added to a bias, zero."""
        from tunesmith.adapt.start import filled
        from tunesmith.models.inserts import Insert
        from tunesmith.models.targets import output_features

        old = _bias(model, target)
        sizes = (output_features(model.get_submodule(target.path)),) if old is None else old.shape
        return Insert(self, {"b": filled(model, target, *sizes)}, None, 1.0)

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """b in the dtype and the shape of y."""
        return insert["b"].to(y.dtype).expand_as(y)

    def fold(self, insert: Insert, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """No weight, and b."""
        return None, insert["b"].detach()


def _bias(model: nn.Module, target: Target) -> nn.Parameter | None:
    return model.get_submodule(target.path)._parameters.get("bias")
