"""How a run is spread over processes, and what the trainer asks of a layout: a sum and a norm over all of them.

One process is the only layout yet. The trainer calls `sum` and `norm` on whatever layout it is given, so that
others come in here without a change there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pydantic import Field, field_validator

from tunesmith.core.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class LayoutSection(Section):
    """The `layout:` section.

    Attributes:
        data: replicas that share the rows of a step.
        shard: which state is split between replicas.
        tensor: processes that split each matrix.
        pipeline: processes that split the blocks.
    """

    data: int = Field(default=1, ge=1)
    shard: str = "none"
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)

    @field_validator("data", "tensor", "pipeline")
    @classmethod
    def _one_process(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"{value} is not there yet; this version runs on one process, so it is 1")
        return value

    @field_validator("shard")
    @classmethod
    def _unsharded(cls, value: str) -> str:
        if value != "none":
            raise ValueError(f"{value!r} is not there yet; this version runs on one process, so it is none")
        return value


class Layout(Protocol):
    """What the trainer needs to know about the other processes of a run."""

    def sum(self, value: float) -> float:
        """The sum of a number over every process that sees different rows."""
        ...

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of the whole model's gradient, float32 or wider scalar."""
        ...


class Single:
    """One process: its own rows and its own gradients are all there are."""

    def sum(self, value: float) -> float:
        return value

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        import torch

        # the dtype keeps the sum of squares of bfloat16 gradients out of bfloat16
        parts = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        return torch.linalg.vector_norm(torch.stack(parts))
