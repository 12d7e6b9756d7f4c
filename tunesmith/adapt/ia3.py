"""IA3: learned factors for keys, values and the MLP's inner numbers (Liu et al. 2022, arXiv 2205.05638).

Factors start at one, so that the adapted model is the base at step 0. At `down` they act on what goes into the map,
elsewhere on what comes out of it, bias and all, as in peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError
from tunesmith.core.section import Names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations.

    Attributes:
        targets: roles, ends of module names, or regexes; `down` is scaled where it reads.
    """

    kind: Literal["ia3"] = "ia3"
    targets: Names = Field(default=("k", "v", "down"), min_length=1)

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a target that the family does not have, or that is no linear map."""
        from tunesmith.models.targets import check_targets

        self._only_maps()
        check_targets(config, self.targets)

    def places(self, loaded: Loaded) -> list[Target]:
        """The linear maps that the targets mean."""
        from tunesmith.models.targets import match

        self._only_maps()
        return match(loaded.model, loaded.family, self.targets)

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """Factors for what `down` reads, elsewhere for what a map answers. Raises ConfigError for an embedding."""
        return self.factors(model, target, "inputs" if target.role == "down" else "outputs")

    def factors(self, model: nn.Module, target: Target, side: Literal["inputs", "outputs"]) -> Insert:
        """Factors of one for the features of a side: of inputs all, of outputs those of the role."""
        from tunesmith.adapt.start import filled
        from tunesmith.models.inserts import Insert
        from tunesmith.models.ports import port_kind
        from tunesmith.models.targets import input_features, output_features

        module = model.get_submodule(target.path)
        if port_kind(module) == "embedding":
            raise ConfigError(f"{target.path} is an embedding, and ia3 acts on linear maps", where="method.targets")
        size = target.rows.count if target.rows is not None else output_features(module)
        if side == "inputs":
            size = input_features(module)
        return Insert(self, {side: filled(model, target, size, value=1.0)}, target.rows, 1.0)

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """y (l - 1), or W (x (l - 1)), in the dtype of y: [..., output features of the role]."""
        from tunesmith.models.inserts import gathered

        # the difference from one first: bfloat16 has more digits for it than for l
        [(name, factors)] = insert.named_parameters()
        change = (factors - 1).to(y.dtype)
        if name == "inputs":
            return insert.mapped(x * change)
        return (y if insert.rows is None else gathered(y, insert.rows)) * change

    def weight(self, insert: Insert) -> Tensor:
        """W with its columns or rows scaled, less W."""
        from tunesmith.models.inserts import gathered
        from tunesmith.models.ports import port_kind

        [(name, factors)] = insert.named_parameters()
        base = insert.port.base
        weight = base.weight.detach().float()  # type: ignore[union-attr,operator]
        weight = weight.T if port_kind(base) == "conv1d" else weight
        change = factors.detach() - 1
        if name == "inputs":
            return weight * change
        rows = weight if insert.rows is None else gathered(weight.T, insert.rows).T
        return rows * change[:, None]

    def fold(self, insert: Insert, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What is scaled where a map answers is all of its answer: bias, and what other adapters have added before."""
        [(name, factors)] = insert.named_parameters()
        if name == "inputs":
            return self.weight(insert), None
        change = factors.detach() - 1
        return weight * change[:, None], None if bias is None else bias * change

    def _only_maps(self) -> None:
        wrong = [name for name in self.targets if name in ("norm", "embed")]
        if wrong:
            raise ConfigError(f"{wrong[0]} is no linear map, and ia3 acts on linear maps", where="method.targets")
