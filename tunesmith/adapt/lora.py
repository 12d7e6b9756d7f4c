"""LoRA: a low-rank change beside chosen linear maps, y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685).

B starts at zero, so that the adapted model is the base at step 0; at an embedding it is A, as in the authors' code.
Factors are float32 and are cast to the dtype of the activations where they act.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError
from tunesmith.core.section import Names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.models.ports import Insert
    from tunesmith.models.targets import Target


class LoRA(Method):
    """Low-rank adaptation.

    Attributes:
        rank: inner size r of the two factors.
        alpha: the change is scaled by alpha / rank; None is 2 x rank.
        targets: roles, ends of module names, or regexes.
        dropout: share of the factor's inputs that are zeroed in training.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732, equation 6).
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    targets: Names = Field(default=("q", "v"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor of B A."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rslora else self.rank))

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a target that the family does not have, or that is no map."""
        from tunesmith.models.targets import check_targets

        self._no_norms()
        check_targets(config, self.targets)

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts a pair of factors at every target.

        Raises:
            ConfigError: a target matches nothing, or the rank is larger than one of the maps.
            AdapterError: the name is taken.
        """
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.models.targets import match

        self._no_norms()
        targets = match(loaded.model, loaded.family, self.targets)
        for target in targets:
            self._sizes(loaded.model, target)
        adapter = Adapter(name, self, loaded)
        for target in targets:
            adapter.add(target, self.insert(loaded.model, target, seed))
        return adapter.close()

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """Fresh factors for a target: A [rank, inputs] uniform as for a linear map, B [outputs, rank] zero.

        Raises:
            ConfigError: the rank is larger than the map.
        """
        import torch
        from torch import nn

        from tunesmith.core.rng import torch_generator
        from tunesmith.models.ports import Insert

        inputs, outputs, embedding = self._sizes(model, target)
        device = next(model.get_submodule(target.path).parameters(recurse=False)).device
        # drawn on the CPU from (seed, place) alone: the same on every device and after any other draw
        place = torch.device("meta" if device.type == "meta" else "cpu")
        a, b = torch.zeros(self.rank, inputs, device=place), torch.zeros(outputs, self.rank, device=place)
        if device.type != "meta":
            draw = torch_generator(seed, "init", target.path, target.role)
            if embedding:
                b.normal_(generator=draw)
            else:
                a.uniform_(-(inputs**-0.5), inputs**-0.5, generator=draw)
        factors = {"A": nn.Parameter(a.to(device)), "B": nn.Parameter(b.to(device))}
        return Insert(self, factors, target.rows, self.scale)

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """s B A x in the dtype of y: [..., outputs]. For an embedding, x holds ids."""
        import torch
        from torch.nn.functional import dropout, embedding, linear

        a, b = insert["A"].to(y.dtype), insert["B"].to(y.dtype)
        if not torch.is_floating_point(x):
            return linear(embedding(x, a.T) * insert.scale, b)
        if self.dropout and insert.training:
            x = dropout(x, self.dropout)
        # the scale on the narrow side: rank numbers a token rather than outputs
        return linear(linear(x, a) * insert.scale, b)

    def weight(self, insert: Insert) -> Tensor:
        """s B A in float32: [outputs, inputs]."""
        return (insert["B"].detach().float() @ insert["A"].detach().float()) * insert.scale

    def _no_norms(self) -> None:
        if "norm" in self.targets:
            raise ConfigError("norm is no linear map, and lora acts on linear maps", where="method.targets")

    def _sizes(self, model: nn.Module, target: Target) -> tuple[int, int, bool]:
        """Input features, output features of the role, and whether the map is an embedding."""
        from tunesmith.models.ports import port_kind

        module = model.get_submodule(target.path)
        kind = port_kind(module)
        first, second = module.weight.shape  # type: ignore[misc,union-attr]
        inputs, outputs = (second, first) if kind == "linear" else (first, second)
        outputs = outputs if target.rows is None else target.rows.count
        limit = min(inputs, outputs)
        if self.rank > limit:
            raise ConfigError(
                f"{self.rank} is more than {limit}, the smaller side of {target.path} ({outputs} x {inputs})",
                where="method.rank",
                hint=f"a rank of at most {limit}, or other targets",
            )
        return inputs, outputs, kind == "embedding"
