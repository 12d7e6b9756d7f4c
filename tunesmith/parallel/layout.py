"""How a run is spread over processes: the section, what the trainer asks of a layout, and one process, the plainest.

The one idea: the trainer's step is the same for all. A layout says what of the masters this process updates (its
*pieces*), adds gradients up over processes, and makes the model's parameters of the updated pieces. One file a
strategy: `ddp.py`, `zero1.py`, `zero2.py`, `zero3.py`; the table is at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from tunesmith.core.section import Section
from tunesmith.parallel.world import ALONE, Alone, World

if TYPE_CHECKING:
    from torch import Tensor, nn

Shard = Literal["none", "zero1", "zero2", "zero3"]


class LayoutSection(Section):
    """The `layout:` section.

    Attributes:
        data: processes that share the rows of a step.
        shard: what is split between them: `none` (every one holds all), `zero1` (moments and master weights), `zero2`
            (gradients, too), `zero3` (the weights themselves, too).
        tensor: processes that split each matrix.
        pipeline: processes that split the blocks.
    """

    data: int = Field(default=1, ge=1)
    shard: Shard = "none"
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)

    @property
    def processes(self) -> int:
        """How many processes there are in all."""
        return self.data * self.tensor * self.pipeline

    @field_validator("tensor", "pipeline")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"{value} is not there yet; matrices and blocks stay whole in this version, so it is 1")
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.shard != "none" and self.data == 1:
            raise ValueError(f"shard: {self.shard} has no effect on one process; set data to how many there are")
        return self


class Held(Protocol):
    """What a layout has to know of the precision (`train.precision`): parameters and masters, by the same names."""

    parameters: dict[str, nn.Parameter]
    masters: dict[str, nn.Parameter]

    def publish(self) -> None: ...


class Layout(Protocol):
    """What the trainer asks about the other processes of a run.

    Attributes:
        world: who they are.
        pieces: what this process updates, by name; `hold` makes them.
        in_step: every forward and backward pass takes all of them.
    """

    world: Alone
    pieces: dict[str, nn.Parameter]
    in_step: bool

    def sum(self, value: float) -> float:
        """The sum of a number over every process that sees different rows."""
        ...

    def adopt(self, tuned: Any) -> Any:
        """A `train.tuned.Tuned` as this layout computes with it; called once, before anything is trained."""
        ...

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        """Takes over the masters and answers the pieces that this process updates, by the same names."""
        ...

    def passed(self) -> None:
        """After each backward pass, or in the place of one that another process makes."""
        ...

    def reduce(self, names: Collection[str]) -> set[str]:
        """Makes the sum over processes the gradient of the pieces; after the last backward pass of a step.

        Args:
            names: what trains in this step.

        Returns:
            Names that no process's loss has reached; where this process holds all, they are still without gradient.
        """
        ...

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of the whole model's gradient, of those of this process's pieces; float32 or wider scalar."""
        ...

    def publish(self, held: Held, names: Collection[str]) -> None:
        """Makes the parameters that the model computes with of the updated pieces, whose names these are."""
        ...

    def clear(self) -> None:
        """Frees the gradients of the pieces."""
        ...

    def gradients(self) -> list[Tensor]:
        """What this process holds of gradients now."""
        ...

    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of the pieces of all processes, on the first; nothing on the others."""
        ...

    def room(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Room for the whole tensors, on the first; nothing on the others."""
        ...

    def deal(self, whole: Mapping[str, Tensor], pieces: Mapping[str, Tensor]) -> None:
        """Fills the pieces of all processes from the first one's whole tensors."""
        ...

    def close(self) -> None:
        """Leaves the parameters as ordinary ones."""
        ...


class Single:
    """One process: its own rows and its own gradients are all there are."""

    in_step = False

    def __init__(self, world: Alone = ALONE) -> None:
        self.world = world
        self.masters: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, nn.Parameter] = {}

    def sum(self, value: float) -> float:
        return self.world.sums([value])[0]

    def adopt(self, tuned: Any) -> Any:
        return tuned

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.masters = self.pieces = held.masters
        return held.masters

    def passed(self) -> None:
        pass

    def reduce(self, names: Collection[str]) -> set[str]:
        return {name for name in names if self.masters[name].grad is None}

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        import torch

        # the dtype keeps the sum of squares of bfloat16 gradients out of bfloat16
        parts = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        return torch.linalg.vector_norm(torch.stack(parts))

    def publish(self, held: Held, names: Collection[str]) -> None:
        held.publish()

    def clear(self) -> None:
        pass

    def gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(pieces)

    def room(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(pieces)

    def deal(self, whole: Mapping[str, Tensor], pieces: Mapping[str, Tensor]) -> None:
        pass

    def close(self) -> None:
        pass


STRATEGIES = {
    "none": "tunesmith.parallel.ddp:Ddp",
    "zero1": "tunesmith.parallel.zero1:Zero1",
    "zero2": "tunesmith.parallel.zero2:Zero2",
    "zero3": "tunesmith.parallel.zero3:Zero3",
}


def layout_of(section: LayoutSection, world: Alone) -> Layout:
    """The layout of a section in the world of this process."""
    if not isinstance(world, World):
        return Single()
    module, _, name = STRATEGIES[section.shard].partition(":")
    found: Layout = getattr(import_module(module), name)(world)
    return found
