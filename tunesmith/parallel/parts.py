"""Layouts in which a process holds a part of the model: tensor parallelism, pipelines, and products with data.

The one idea: processes that hold the same part are a world of their own, in which a data-parallel layout does what it
always does; those that hold together one model are another (`parts`). Data is the outer axis of the two, so that the
first processes of the run hold one model. Which part of which tensor a process has is told once, and serves the norm,
checkpoints and the adapter: they are put together on the first process. What computes is `tensor.py` and `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tunesmith.parallel.buckets import fill
from tunesmith.parallel.layout import Held, LayoutSection, Single, of_data
from tunesmith.parallel.pieces import runs_of_cut
from tunesmith.parallel.world import Alone, World


class Parts(Single):
    """What both have in common.

    Attributes:
        data: the processes with other rows and the same part.
        parts: the processes with the same rows and other parts, those of one stage side by side.
        pipe: of these, the ones with other blocks.
        split: of these, the ones with the same blocks and other parts of their matrices.
        axes: the axis along which a tensor is cut over `split`, by name; one that is not named is whole where it is.
        shared: names of pieces whose gradients are added up over `split`, because each computes some of it.
    """

    world: World
    in_parts = True

    def __init__(self, world: World, section: LayoutSection) -> None:
        super().__init__(world)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        whole = init_device_mesh(device, (section.data, section.parts), mesh_dim_names=("data", "parts"))
        self.parts = world.within(whole.get_group("parts"))
        shape = section.data, section.pipeline, section.tensor
        self.mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "pipe", "split"))
        data, self.pipe, self.split = (world.within(self.mesh.get_group(axis)) for axis in range(3))
        self.inner = of_data(section.shard, data)
        self.data = data if section.data > 1 else Alone()
        self.axes: dict[str, int] = {}
        self.shared: set[str] = set()
        self._tables: list[dict[str, list[int]]] = []
        self.in_step = self.inner.in_step

    def cut(self, tuned: Any) -> None:
        """Leaves of a model what is this process's; called once, by `adopt`."""

    def adopt(self, tuned: Any) -> Any:
        self.cut(tuned)
        return self.inner.adopt(tuned)

    def sum(self, value: float) -> float:
        return self.data.sums([value])[0]

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.pieces = self.inner.hold(held)
        self.masters = held.masters
        self._tables = self.parts.told({name: list(master.shape) for name, master in self.masters.items()})
        self.axes = {name: axis for known in self.parts.told(self.axes) for name, axis in known.items()}
        return self.pieces

    def passed(self, turn: int | None = None) -> None:
        self.inner.passed(turn)

    def reduce(self, names: Collection[str]) -> set[str]:
        unreached = self.inner.reduce(names)
        # of pieces: those with the same blocks have pieces of the same numbers
        self._add_up(self.shared & set(names), self.split)
        return unreached

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        counted = {id(self.pieces[name].grad) for name in self.pieces if self._owner(name) in (None, self.parts.rank)}
        mine = [gradient for gradient in gradients if id(gradient) in counted]
        square = float(self.inner.norm(mine)) ** 2 if mine else 0.0
        return torch.tensor(self.parts.sums([square])[0], dtype=torch.float64).sqrt()

    def publish(self, held: Held, names: Collection[str]) -> None:
        self.inner.publish(held, names)

    def clear(self) -> None:
        self.inner.clear()

    def gradients(self) -> list[Tensor]:
        return self.inner.gradients()

    def close(self) -> None:
        self.inner.close()

    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mine, dtypes = self.inner.whole(pieces), self._dtypes(pieces)
        if not self.data.is_first:
            return {}
        if not self.parts.is_first:
            for name in sorted(mine):
                if self._owner(name) in (None, self.parts.rank):
                    self.parts.traffic.send(mine[name].detach().contiguous(), 0)
            return {}
        held: dict[str, list[Tensor]] = {}
        for rank, table in enumerate(self._tables):
            for name in sorted(dtypes[rank]):
                if self._owner(name) not in (None, rank):
                    continue
                part = mine[name].detach() if not rank else torch.empty(table[name], dtype=dtypes[rank][name])
                if rank:
                    self.parts.traffic.receive(part, rank)
                held.setdefault(name, []).append(part)
        return {
            name: torch.cat(parts, self.axes[name]) if len(parts) > 1 else parts[0].clone()
            for name, parts in sorted(held.items())
        }

    def wholes(self, pieces: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        dtypes = {name: dtype for told in self._dtypes(pieces) for name, dtype in told.items()}
        return {name: (dtype, tuple(self._shape(name))) for name, dtype in sorted(dtypes.items())}

    def runs(self, name: str, piece: Tensor) -> Sequence[tuple[int, int]]:
        inner, axis = self.inner.runs(name, piece), self.axes.get(name)
        if axis is None:
            return inner
        shape, size, rank = self._shape(name), self.split.size, self.split.rank
        return [run for within in inner for run in runs_of_cut(shape, axis, size, rank, within)]

    def cuts(self, name: str) -> Sequence[int]:
        return self.inner.cuts(name)

    def keeps(self, name: str) -> bool:
        return self.inner.keeps(name) and self._owner(name) in (None, self.parts.rank)

    def _owner(self, name: str) -> int | None:
        """The first of the parts that has a tensor whole; None where it is cut and each has some of it."""
        if name in self.axes:
            return None
        return next(rank for rank, table in enumerate(self._tables) if name in table)

    def _shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        part = next(table[name] for table in self._tables if name in table)
        return [size * self.split.size if at == self.axes.get(name) else size for at, size in enumerate(part)]

    def _dtypes(self, pieces: Mapping[str, Tensor]) -> list[dict[str, torch.dtype]]:
        """Of the pieces of each part, by name; none where there are none yet, as of moments before the first step."""
        told = self.parts.told({name: str(piece.dtype).removeprefix("torch.") for name, piece in pieces.items()})
        return [{name: getattr(torch, dtype) for name, dtype in held.items()} for held in told]

    def _add_up(self, names: Collection[str], among: World) -> None:
        """Makes the sum over some processes, whose pieces are of the same numbers, the gradient of each of them.

        A loss may reach what is tied on one of them alone.
        """
        held = {name: self.pieces[name] for name in sorted(names)}
        for bucket in fill(held, among.size):
            first = held[next(iter(bucket.spans))]
            flat = bucket.zeros(first.dtype, first.device)
            for name in bucket.spans:
                gradient = held[name].grad
                if gradient is not None:
                    bucket.put(flat, name, gradient)
            among.traffic.all_reduce(flat)
            for name in bucket.spans:
                held[name].grad = bucket.get(flat, name).view(held[name].shape)
