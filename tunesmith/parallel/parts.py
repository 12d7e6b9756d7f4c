"""Layouts in which a process holds a part of the model: tensor parallelism and pipelines, and data parallelism of them.

The one idea: processes that hold the same part are a world of their own, in which a data-parallel layout does what it
always does; those that hold together one model are another (`parts`). Data is the outer axis of the two, so that the
first processes of the run hold one model. Which part of which tensor a process has is told once, and serves the norm,
checkpoints and the adapter: they are put together on the first process. What computes is `tensor.py` and `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tunesmith.parallel.buckets import fill
from tunesmith.parallel.layout import Held, Layout, LayoutSection, Single, of_data
from tunesmith.parallel.pieces import runs_of_cut
from tunesmith.parallel.world import Alone, World


class Parts(Single):
    """What both have in common.

    Attributes:
        data: the processes with other rows and the same part.
        parts: the processes with the same rows and other parts.
        axes: the axis along which a tensor is cut, by name; one that is not named is whole where it is.
        shared: names of pieces whose gradients are added up over `parts`, because each computes some of it.
    """

    world: World
    in_parts = True

    def __init__(self, world: World, section: LayoutSection) -> None:
        super().__init__(world)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = section.data, section.processes // section.data
        self.mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "parts"))
        data = world.within(self.mesh.get_group("data"))
        self.parts = world.within(self.mesh.get_group("parts"))
        self.inner: Layout = of_data(section.shard, data)
        self.data = data if section.data > 1 else Alone()
        self.axes: dict[str, int] = {}
        self.shared: set[str] = set()
        self._tables: list[dict[str, list[int]]] = []
        self._wholes: dict[str, list[int]] = {}

    def sum(self, value: float) -> float:
        return self.data.sums([value])[0]

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.pieces = self.inner.hold(held)
        self.masters = held.masters
        self._tables = self.parts.told({name: list(master.shape) for name, master in self.masters.items()})
        self.axes = {name: axis for known in self.parts.told(self.axes) for name, axis in known.items()}
        self._wholes = self._shapes()
        return self.pieces

    def passed(self) -> None:
        self.inner.passed()

    def reduce(self, names: Collection[str]) -> set[str]:
        self._add_up(self.shared & set(names), self.parts)
        return self.inner.reduce(names)

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
        mine = self.inner.whole(pieces)
        if not self.data.is_first or not pieces:  # before the first step there are no moments, anywhere
            return {}
        if not self.parts.is_first:
            for name in sorted(mine):
                if self._owner(name) in (None, self.parts.rank):
                    self.parts.traffic.send(mine[name].detach().contiguous(), 0)
            return {}
        dtype = next(iter(pieces.values())).dtype
        held: dict[str, list[Tensor]] = {}
        for rank, table in enumerate(self._tables):
            for name in sorted(table):
                if self._owner(name) not in (None, rank):
                    continue
                part = mine[name].detach() if not rank else torch.empty(table[name], dtype=dtype)
                if rank:
                    self.parts.traffic.receive(part, rank)
                held.setdefault(name, []).append(part)
        return {
            name: torch.cat(parts, self.axes[name]) if len(parts) > 1 else parts[0].clone()
            for name, parts in sorted(held.items())
        }

    def shapes(self, pieces: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        if not pieces:  # before the first step there are no moments, anywhere
            return {}
        return {name: tuple(shape) for name, shape in self._wholes.items()}

    def runs(self, name: str, piece: Tensor) -> Sequence[tuple[int, int]]:
        inner, axis = self.inner.runs(name, piece), self.axes.get(name)
        if axis is None:
            return inner
        shape, size, rank = self._wholes[name], self.parts.size, self.parts.rank
        return [run for within in inner for run in runs_of_cut(shape, axis, size, rank, within)]

    def keeps(self, name: str) -> bool:
        return self.inner.keeps(name) and self._owner(name) in (None, self.parts.rank)

    def _owner(self, name: str) -> int | None:
        """The first of the parts that has a tensor whole; None where it is cut and each has some of it."""
        if name in self.axes:
            return None
        return next(rank for rank, table in enumerate(self._tables) if name in table)

    def _shapes(self) -> dict[str, list[int]]:
        """The shapes of all whole tensors of the model that train."""
        found = {}
        for table in self._tables:
            for name, shape in table.items():
                axis = self.axes.get(name)
                sizes = [size * self.parts.size if at == axis else size for at, size in enumerate(shape)]
                found[name] = sizes
        return dict(sorted(found.items()))

    def _add_up(self, names: Collection[str], among: World) -> None:
        """Makes the sum over some processes the gradient of each of them."""
        held = {name: self.masters[name] for name in sorted(names) if self.masters[name].grad is not None}
        for bucket in fill(held, among.size):
            first = held[next(iter(bucket.spans))]
            flat = bucket.zeros(first.dtype, first.device)
            for name in bucket.spans:
                bucket.put(flat, name, held[name].grad)  # type: ignore[arg-type]
            among.traffic.all_reduce(flat)
            for name in bucket.spans:
                held[name].grad = bucket.get(flat, name).view(held[name].shape)
