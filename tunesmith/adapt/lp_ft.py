"""Linear probe, then full tuning, in one run (Kumar et al. 2022, arXiv 2202.10054).

A fresh output layer sends gradients that mean nothing through features that are good; so it learns first, alone, and
everything follows from there with fresh moments. The base is gone afterwards, as after full tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.adapt.method import Method, Phase
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded


class LPFT(Method):
    """Trains the output layer for the first steps and everything for the rest.

    Attributes:
        probe: share of the steps in which the output layer trains alone: the prediction head where there is one, else
            the head over the vocabulary, which is untied from the embedding.
    """

    trains_all: ClassVar[bool] = True
    kind: Literal["lp_ft"] = "lp_ft"
    probe: float = Field(default=0.3, gt=0, lt=1)

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Unfreezes every parameter, in two phases.

        Raises:
            ConfigError: the model has no output layer.
            AdapterError: another adapter is attached.
        """
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.models.heads import PREFIX
        from tunesmith.models.targets import match

        family = loaded.family
        if loaded.predicts is None and "head" not in family.roles:
            told = f"{family.name} has no output layer"
            raise ConfigError(told, where="method.kind", hint="objective: predict gives it one")
        heads = [] if loaded.predicts else match(loaded.model, family, ("head",), "method.kind")
        adapter = Adapter(name, self, loaded)
        for head in heads:
            _untie(loaded.model, head.path)
        adapter.train_in_place()
        adapter.close()
        first = tuple(f"{head.path}." for head in heads) or (PREFIX,)
        probed = frozenset(found for found in adapter.parameters if found.startswith(first))
        adapter.phases = (Phase(self.probe, probed), Phase(1.0))
        return adapter


def _untie(model: Any, path: str) -> None:
    from torch import nn

    from tunesmith.models.copies import sharing

    if len(sharing(model, f"{path}.weight")) > 1:
        module = model.get_submodule(path)
        module.weight = nn.Parameter(module.weight.detach().clone())
        model.config.tie_word_embeddings = False
