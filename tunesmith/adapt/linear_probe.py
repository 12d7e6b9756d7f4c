"""Linear probe: the output layer alone trains, on what the frozen model computes.

Where the run predicts labels, that is the prediction head. Where it writes text, it is the head over the vocabulary,
trained as what is added to it, from zero: a tied embedding stays as it is, and rows of one batch may differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


class LinearProbe(Method):
    """Trains the output layer."""

    kind: Literal["linear_probe"] = "linear_probe"

    def places(self, loaded: Loaded) -> list[Target]:
        """The head over the vocabulary; nowhere where there is a prediction head."""
        from tunesmith.models.targets import match

        if loaded.predicts is not None:
            return []
        if "head" not in loaded.family.roles:
            told = f"{loaded.family.name} has no output layer"
            raise ConfigError(told, where="method.kind", hint="objective: predict gives it one")
        return match(loaded.model, loaded.family, ("head",), "method.kind")

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """What is added to the head's weight, zero: [vocabulary, width]."""
        from tunesmith.adapt.start import filled
        from tunesmith.models.inserts import Insert

        sizes = model.get_submodule(target.path).weight.shape  # type: ignore[union-attr]
        return Insert(self, {"W": filled(model, target, *sizes)}, None, 1.0)  # type: ignore[misc]

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """W x in the dtype of y: [..., vocabulary]."""
        from torch.nn.functional import linear

        return linear(x, insert["W"].to(y.dtype))

    def weight(self, insert: Insert) -> Tensor:
        """W itself."""
        return insert["W"].detach().float()
