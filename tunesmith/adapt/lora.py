"""LoRA: a low-rank change beside chosen maps, y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685).

B starts at zero, so that the adapted model is the base at step 0; at an embedding it is A, as in the authors' code.
Factors are float32 and are cast to the dtype of the activations where they act. Whole parameters that train as well
are `also_train.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError
from tunesmith.core.section import Names
from tunesmith.models.families import GROUPS, ROLES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.kernels.lowrank import LowRank
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target

Rank = Annotated[int, Field(ge=1)]


class LoRA(Method):
    """Low-rank adaptation.

    Attributes:
        rank: inner size r of the two factors.
        alpha: the change is scaled by alpha / rank; None is 2 x rank.
        targets: roles, ends of module names, or regexes.
        dropout: share of the factor's inputs that are zeroed in training.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732, equation 6).
        ranks: roles with a rank of their own; it takes the place of `rank` in the scale, too.
        lr_ratio: the learning rate of B in that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354). What takes the
            ratio is the factor that starts at zero: at an embedding it is A.
        dora: the lengths of W's rows train apart from their directions, see `dora.py`.
        init: pissa starts the factors at the largest singular parts of W, see `pissa.py`.
        also_train: roles or module names whose parameters train whole.
        tie: where embedding and head share a weight and one of them is in `also_train`, they go on sharing it.
    """

    kind: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: float | None = Field(default=None, gt=0)
    targets: Names = Field(default=("q", "v"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    ranks: dict[str, Rank] = {}
    lr_ratio: float = Field(default=1.0, gt=0)
    dora: bool = False
    init: Literal["default", "pissa"] = "default"
    also_train: Names = ()
    tie: bool = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> LoRA:
        if self.dora and self.init == "pissa":
            raise ValueError("dora and init: pissa are two methods; choose one")
        both = sorted(set(self.targets) & set(self.also_train))
        if both:
            raise ValueError(f"{both[0]} is in targets and in also_train; choose one")
        if self.tie and not self.also_train:
            raise ValueError("tie has no effect without also_train")
        if set(self.targets) <= set(ROLES):
            unused = self._unused_rank({role for target in self.targets for role in GROUPS.get(target, (target,))})
            if unused:
                raise ValueError(f"ranks: {unused!r} is none of the targets")
        return self

    @property
    def scale(self) -> float:
        """Factor of B A where a role has no rank of its own."""
        return self.scaled(self.rank)

    def scaled(self, rank: int) -> float:
        """Factor of B A at a rank."""
        alpha = 2.0 * rank if self.alpha is None else self.alpha
        return float(alpha / (rank**0.5 if self.rslora else rank))

    def rank_at(self, role: str) -> int:
        """The rank of a role: its own, its group's, or the common one."""
        groups = [group for group, parts in GROUPS.items() if role in parts]
        return next((self.ranks[name] for name in (role, *groups) if name in self.ranks), self.rank)

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a target that the family does not have, or that is no map."""
        from tunesmith.models.targets import check_targets

        self._no_norms()
        check_targets(config, self.targets)
        check_targets(config, self.also_train, "method.also_train")

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts a pair of factors at every target, and copies at what trains whole.

        Raises:
            ConfigError: a target matches nothing, or the rank is larger than one of the maps.
            AdapterError: the name is taken.
        """
        for target in self.places(loaded):
            self._fits(loaded.model, target)
        return self._attached(loaded, name, seed)

    def blank(self, loaded: Loaded, name: str = "default") -> Adapter:
        """The same without a start, to be filled from a file: any rank, no decomposition."""
        return self._attached(loaded, name, None)

    def places(self, loaded: Loaded) -> list[Target]:
        """The maps that targets mean. Raises ConfigError where one means nothing."""
        from tunesmith.models.targets import match

        self._no_norms()
        targets = match(loaded.model, loaded.family, self.targets)
        unused = self._unused_rank({target.role for target in targets})
        if unused:
            raise ConfigError(f"{unused!r} is none of the targets", where="method.ranks")
        return targets

    def insert(self, model: nn.Module, target: Target, seed: int | None = 0) -> Insert:
        """Fresh factors for a target: A [rank, inputs] uniform as for a linear map, B [outputs, rank] zero.

        Args:
            seed: None leaves both at zero.
        """
        from tunesmith.adapt import dora, pissa
        from tunesmith.adapt.start import filled, normal, uniform
        from tunesmith.models.inserts import Insert

        module, rank = model.get_submodule(target.path), self.rank_at(target.role)
        inputs, outputs, is_embedding = _sizes(module, target)
        a, b = filled(model, target, rank, inputs), filled(model, target, outputs, rank)
        if seed is not None and is_embedding:
            b = normal(model, target, outputs, rank, seed=seed)
        elif seed is not None:
            a = uniform(model, target, rank, inputs, bound=inputs**-0.5, seed=seed)
        factors = {"A": a, "B": b}
        insert = Insert(self, factors, target.rows, self.scaled(rank))
        if self.dora:
            dora.start(insert, module)
        if self.init == "pissa":
            pissa.start(insert, module, is_blank=seed is None)
        return insert

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the role's features, in the dtype of y: [..., outputs]. For an embedding, x holds ids."""
        from tunesmith.adapt import dora, pissa

        dropped = self._dropped(insert, x)
        if self.init == "pissa":
            return pissa.delta(insert, x, dropped, y.dtype)
        change = low_rank(insert["A"], insert["B"], insert.scale, dropped, y.dtype)
        return dora.delta(insert, x, dropped, change, y) if self.dora else change

    def low_rank(self, insert: Insert) -> LowRank | None:
        """The factors of now, where the change is just s B A x."""
        from tunesmith.kernels.lowrank import LowRank

        if self.dora or self.init == "pissa" or (self.dropout and insert.training):
            return None
        return LowRank(insert["A"], insert["B"], insert.scale)

    def weight(self, insert: Insert) -> Tensor:
        """The change of W in float32: [outputs, inputs]."""
        from tunesmith.adapt import dora, pissa

        if self.init == "pissa":
            return pissa.weight(insert)
        change = (insert["B"].detach().float() @ insert["A"].detach().float()) * insert.scale
        return dora.weight(insert, change) if self.dora else change

    def factors(self, insert: Insert) -> tuple[Tensor, Tensor]:
        """The low-rank change s B A as a pair: A [rank, inputs] and B [outputs, rank]; PiSSA's has twice the rank."""
        from tunesmith.adapt import pissa

        return pissa.factors(insert) if self.init == "pissa" else (insert["A"].detach(), insert["B"].detach())

    def fill(self, insert: Insert, a: Tensor, b: Tensor) -> None:
        """Takes over a pair that `factors` has made."""
        from tunesmith.adapt import pissa

        if self.init == "pissa":
            return pissa.fill(insert, a, b)
        insert["A"].copy_(a)
        insert["B"].copy_(b)

    def _dropped(self, insert: Insert, x: Tensor) -> Tensor:
        """The input of the factors: x, with dropout in training; ids stay what they are."""
        import torch
        from torch.nn.functional import dropout

        if self.dropout and insert.training and torch.is_floating_point(x):
            return dropout(x, self.dropout)
        return x

    def _attached(self, loaded: Loaded, name: str, seed: int | None) -> Adapter:
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.adapt.also_train import groups
        from tunesmith.models.ports import port_kind

        targets = self.places(loaded)
        whole = groups(loaded, self.also_train, self.tie, {target.path for target in targets})
        if self.tie and all(len(paths) == 1 for paths in whole):
            raise ConfigError("no weight of what is trained whole is shared", where="method.tie", hint="leave it out")
        made = [(target, self.insert(loaded.model, target, seed)) for target in targets]
        adapter = Adapter(name, self, loaded)
        for target, insert in made:
            adapter.add(target, insert)
        for paths in whole:
            adapter.train_copy(*paths)
        if self.lr_ratio != 1:
            adapter.lr_factors = {
                f"{port.path}.{role}.{'A' if port_kind(port) == 'embedding' else 'B'}": self.lr_ratio
                for port, role, _ in adapter.inserts()
            }
        return adapter.close()

    def _no_norms(self) -> None:
        if "norm" in self.targets:
            raise ConfigError("norm is no linear map, and lora acts on linear maps", where="method.targets")

    def _unused_rank(self, roles: set[str]) -> str | None:
        return next((name for name in self.ranks if not roles & {name, *GROUPS.get(name, ())}), None)

    def _fits(self, model: nn.Module, target: Target) -> None:
        rank, (inputs, outputs, _) = self.rank_at(target.role), _sizes(model.get_submodule(target.path), target)
        limit = min(inputs, outputs)
        if rank > limit:
            raise ConfigError(
                f"{rank} is more than {limit}, the smaller side of {target.path} ({outputs} x {inputs})",
                where="method.ranks" if rank != self.rank else "method.rank",
                hint=f"a rank of at most {limit}, or other targets",
            )


def low_rank(a: Tensor, b: Tensor, scale: float, x: Tensor, dtype: Any) -> Tensor:
    """s B A x: [..., outputs] in a dtype. For an embedding, x holds ids."""
    import torch
    from torch.nn.functional import embedding, linear

    a, b = a.to(dtype), b.to(dtype)
    narrow = linear(x, a) if torch.is_floating_point(x) else embedding(x, a.T)
    # the scale on the narrow side: rank numbers a token rather than outputs
    return linear(narrow * scale, b)


def _sizes(module: nn.Module, target: Target) -> tuple[int, int, bool]:
    """Input features, output features of the role, and whether the map is an embedding."""
    from tunesmith.models.ports import port_kind
    from tunesmith.models.targets import input_features, output_features

    outputs = output_features(module) if target.rows is None else target.rows.count
    return input_features(module), outputs, port_kind(module) == "embedding"
