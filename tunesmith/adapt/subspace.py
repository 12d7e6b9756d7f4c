"""A random subspace: W = W0 + P z with a fixed random P and few trained numbers z (Li et al. 2018, arXiv 1804.08838).

How small z may be before the task is no longer learnt is the task's intrinsic dimension. P has one entry a row, of
random place and sign (`projection.py`), rather than the dense or Fastfood matrices of the paper and of Aghajanyan et
al. 2021 (arXiv 2012.13255): its columns are exactly orthogonal, and nothing of the size of the model is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded


class Subspace(Method):
    """Trains `dimension` numbers that move the weights of all linear maps of the blocks.

    Attributes:
        dimension: how many. A step of one along any of them moves the weights by a distance of about one, so that
            learning rates are larger than for other methods: 1e-2 is a start.
    """

    kind: Literal["subspace"] = "subspace"
    dimension: int = Field(default=1000, ge=1)

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts the one z at the first map and the others beside it. P depends on `seed`, which is saved.

        Raises:
            ConfigError: the blocks are not known, or have fewer weights than `dimension`.
            AdapterError: the name is taken.
        """
        from torch import nn

        from tunesmith.adapt.adapter import Adapter
        from tunesmith.adapt.projection import Projection
        from tunesmith.adapt.start import filled
        from tunesmith.core.rng import seed_for
        from tunesmith.models.targets import linear_maps

        targets = linear_maps(loaded.model, loaded.family)
        sizes = [loaded.model.get_submodule(target.path).weight.numel() for target in targets]  # type: ignore[operator,union-attr]
        if self.dimension > sum(sizes):
            raise ConfigError(
                f"{self.dimension} is more than the {sum(sizes)} weights that it moves", where="method.dimension"
            )
        adapter = Adapter(name, self, loaded)
        adapter.seed = seed
        z: Any = filled(loaded.model, targets[0], self.dimension)
        # with entries of this size columns of P have a length of about one
        entry = (self.dimension / sum(sizes)) ** 0.5
        for target in targets:
            part = Projection(self, z, seed_for(seed, "projection", target.path), entry)
            adapter.add(target, part)
            z = part if isinstance(z, nn.Parameter) else z
        return adapter.close()

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """(P z) x in the dtype of y: [..., outputs]."""
        from tunesmith.adapt.projection import Projection

        assert isinstance(insert, Projection)
        return insert.applied(x).to(y.dtype)

    def weight(self, insert: Insert) -> Tensor:
        """P z as a matrix, float32 [outputs, inputs]."""
        from tunesmith.adapt.projection import Projection

        assert isinstance(insert, Projection)
        return insert.matrix(insert.z.detach())
