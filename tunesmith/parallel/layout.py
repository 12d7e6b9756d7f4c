"""How a run is spread over processes: the section, what the trainer asks of a layout, and one process, the plainest.

The one idea: the trainer's step is the same for all. A layout says what of the masters this process updates (its
*pieces*), adds gradients up over processes, and makes the model's parameters of the updated pieces. One file a
strategy: `ddp.py`, `zero1.py`, `zero2.py`, `zero3.py`, `tensor.py`, `pipeline.py`; the table is at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from tunesmith.core.section import Section
from tunesmith.parallel.world import ALONE, Alone, World

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tunesmith.core.types import Batch

Shard = Literal["none", "zero1", "zero2", "zero3"]
Schedule = Literal["gpipe", "1f1b", "interleaved"]
CHUNKS = 2  # parts of the model that each process of an interleaved pipeline has


class LayoutSection(Section):
    """The `layout:` section.

    Attributes:
        data: processes that share the rows of a step.
        shard: what is split between them: `none` (every one holds all), `zero1` (moments and master weights), `zero2`
            (gradients, too), `zero3` (the weights themselves, too).
        tensor: processes that split each matrix of a block.
        pipeline: processes that split the blocks.
        micro_batches: into how many a step is cut for a pipeline, at most; None cuts as `train` says.
        schedule: in which order a pipeline computes them; `1f1b` where nothing is said.
    """

    data: int = Field(default=1, ge=1)
    shard: Shard = "none"
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    micro_batches: int | None = Field(default=None, ge=1)
    schedule: Schedule | None = None

    @property
    def processes(self) -> int:
        """How many processes there are in all."""
        return self.data * self.tensor * self.pipeline

    @property
    def parts(self) -> int:
        """How many processes hold one model together."""
        return self.tensor * self.pipeline

    @property
    def stages(self) -> int:
        """Into how many parts a pipeline cuts the model."""
        return self.pipeline * (CHUNKS if self.schedule == "interleaved" else 1)

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.shard != "none" and self.data == 1:
            raise ValueError(f"shard: {self.shard} has no effect on one process; set data to how many there are")
        for name in ("micro_batches", "schedule"):
            value = getattr(self, name)
            if value is not None and self.pipeline == 1:
                raise ValueError(
                    f"{name}: {value} has no effect without a pipeline; set pipeline to how many there are"
                )
        if self.shard == "zero3" and self.schedule == "interleaved":
            raise ValueError("schedule: interleaved runs through blocks that zero3 would gather in vain; take 1f1b")
        return self


class AutoLayout(LayoutSection):
    """`layout: auto`: one is chosen for the processes that there are (`run.spreading`)."""


class Held(Protocol):
    """What a layout has to know of the precision (`train.precision`): parameters and masters, by the same names."""

    parameters: dict[str, nn.Parameter]
    masters: dict[str, nn.Parameter]

    def publish(self) -> None: ...


class Passes(Protocol):
    """Who makes all forward and backward passes of a step together."""

    def __call__(
        self,
        objective: Any,
        batches: Sequence[Batch],
        weight: float,
        reseed: Callable[[int], object],
        spare: Batch | None,
    ) -> list[Tensor]:
        """Adds the gradient of a step, each loss divided by `weight`, and answers the totals of its micro-batches.

        Args:
            spare: what is computed, and weighs nothing, where there are none and others have some.
        """
        ...


class Layout(Protocol):
    """What the trainer asks about the other processes of a run.

    Attributes:
        world: who they are.
        data: those of them that have other rows.
        passes: who makes the passes of a step in the trainer's place; None lets the trainer make them one by one.
        pieces: what this process updates, by name; `hold` makes them.
        in_step: every forward and backward pass takes all of them.
        in_parts: no process has the whole model while it trains.
    """

    world: Alone
    data: Alone
    passes: Passes | None
    pieces: dict[str, nn.Parameter]
    in_step: bool
    in_parts: bool

    def sum(self, value: float) -> float:
        """The sum of a number over every process that sees different rows."""
        ...

    def adopt(self, tuned: Any) -> Any:
        """A `train.tuned.Tuned` as this layout computes with it; called once, before anything is trained."""
        ...

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        """Takes over the masters and answers the pieces that this process updates, by the same names."""
        ...

    def passed(self, turn: int | None = None) -> None:
        """After each backward pass, or in the place of one that another process makes.

        Args:
            turn: which tensors have gradients of it (`Single.turns`); None for all.
        """
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

    def wholes(self, pieces: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the whole tensors of the pieces of all processes; on every one."""
        ...

    def runs(self, name: str, piece: Tensor) -> Sequence[tuple[int, int]]:
        """Where the numbers of a piece lie in the whole tensor: first and behind the last of each run, in order."""
        ...

    def cuts(self, name: str) -> Sequence[int]:
        """Where replicas cut a tensor of theirs into pieces: numbers before each cut, in order."""
        ...

    def keeps(self, name: str) -> bool:
        """Whether a checkpoint has the numbers of a piece from this process, and not from another that has the same."""
        ...

    def facts(self) -> dict[str, Any]:
        """What this process has sent, and what else there is to say of how it worked; JSON."""
        ...

    def close(self) -> None:
        """Leaves the parameters as ordinary ones."""
        ...


class Single:
    """One process: its own rows and its own gradients are all there are.

    Attributes:
        apart: names of tensors that processes with other tensors beside them have to cut in the same way.
        turns: in which of the backward passes of a micro-batch a tensor's gradient comes, by name; 0 for others.
    """

    apart: Collection[str] = ()
    turns: Mapping[str, int] = MappingProxyType({})
    in_step = in_parts = False
    passes: Passes | None = None

    def __init__(self, world: Alone = ALONE) -> None:
        self.world = self.data = world
        self.masters: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, nn.Parameter] = {}

    def sum(self, value: float) -> float:
        return self.world.sums([value])[0]

    def adopt(self, tuned: Any) -> Any:
        return tuned

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.masters = self.pieces = held.masters
        return held.masters

    def passed(self, turn: int | None = None) -> None:
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

    def wholes(self, pieces: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (piece.dtype, tuple(piece.shape)) for name, piece in pieces.items()}

    def runs(self, name: str, piece: Tensor) -> Sequence[tuple[int, int]]:
        return [(0, piece.numel())]

    def cuts(self, name: str) -> Sequence[int]:
        return ()

    def keeps(self, name: str) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        return self.world.total()

    def close(self) -> None:
        pass


STRATEGIES = {
    "none": "tunesmith.parallel.ddp:Ddp",
    "zero1": "tunesmith.parallel.zero1:Zero1",
    "zero2": "tunesmith.parallel.zero2:Zero2",
    "zero3": "tunesmith.parallel.zero3:Zero3",
    "tensor": "tunesmith.parallel.tensor:TensorParallel",
    "pipeline": "tunesmith.parallel.pipeline:Pipeline",
    "both": "tunesmith.parallel.both:TensorPipeline",
}


def layout_of(section: LayoutSection, world: Alone) -> Layout:
    """The layout of a section in the world of this process."""
    if not isinstance(world, World):
        return Single()
    if section.parts == 1:
        return of_data(section.shard, world)
    name = "tensor" if section.pipeline == 1 else "pipeline" if section.tensor == 1 else "both"
    found: Layout = _strategy(name)(world, section)
    return found


def of_data(shard: Shard, world: World) -> Single:
    """The layout of processes that have other rows and the same model."""
    if world.size == 1:
        return Single()
    found: Single = _strategy(shard)(world)
    return found


def _strategy(name: str) -> Any:
    module, _, kind = STRATEGIES[name].partition(":")
    return getattr(import_module(module), kind)
