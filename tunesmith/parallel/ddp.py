"""Data parallelism: every process holds all, and gradients are added up once a step (Li et al. 2020, arXiv 2006.15704).

The sum is torch.distributed's all-reduce over flat buckets: 2 psi sent for psi numbers of gradients. It is a sum and
no mean, because the loss is divided by the weight of all processes already; and it comes after the last micro-batch,
so that accumulation costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.parallel.buckets import Bucket, fill
from tunesmith.parallel.layout import Held
from tunesmith.parallel.pieces import Place
from tunesmith.parallel.sharded import Placed, Sharded
from tunesmith.parallel.world import World


class Ddp(Placed):
    """Replicas with the whole state each."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.buckets: list[Bucket] = []

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.masters = self.pieces = held.masters
        self.buckets = fill(self.masters, self.world.size)
        everything = ((0, master.numel()) for master in self.masters.values())
        self.places = {
            name: Place(master.shape, (span,) * self.world.size)
            for (name, master), span in zip(self.masters.items(), everything, strict=True)
        }
        return self.masters

    def reduce(self, names: Collection[str]) -> set[str]:
        missing = self._missing(names)
        for bucket in self.acting(names):
            flat = self.gathered(bucket)
            self.world.traffic.all_reduce(flat)
            for name in set(bucket.spans) & set(names):
                self.masters[name].grad = bucket.get(flat, name).view(self.masters[name].shape)
        return missing

    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # all are the same: nothing need be sent
        return dict(pieces) if self.world.is_first else {}

    def acting(self, names: Collection[str]) -> list[Bucket]:
        """The buckets with something that trains now."""
        return [bucket for bucket in self.buckets if set(bucket.spans) & set(names)]

    def gathered(self, bucket: Bucket) -> Tensor:
        """The gradients of a bucket's masters, side by side; freed where they were. Zeros where there is none."""
        first = self.masters[next(iter(bucket.spans))]
        flat = bucket.zeros(first.dtype, first.device)
        for name in bucket.spans:
            master = self.masters[name]
            if master.grad is not None:
                bucket.put(flat, name, master.grad)
                master.grad = None
        return flat

    def _missing(self, names: Collection[str]) -> set[str]:
        """Names that no process's loss has reached."""
        ordered = sorted(names)
        reached = self.world.sums([float(self.masters[name].grad is not None) for name in ordered])
        return {name for name, count in zip(ordered, reached, strict=True) if not count}


class Split(Sharded, Ddp):
    """What ZeRO's first two stages share: each process updates one part of every bucket, and all parts are gathered.

    Rajbhandari et al. 2020, arXiv 1910.02054, section 5. A piece of a parameter in float32 is that part of the
    parameter itself; one of a parameter in fewer bits is part of its master, of which nothing else is kept.
    """

    def adopt(self, tuned: Any) -> Any:
        """The same. Raises ConfigError for a method that looks at whole gradients."""
        refuse_watchers(tuned)
        return tuned

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        self.masters = held.masters
        # by the parameters' dtype: that is what is gathered
        self.buckets = fill(held.parameters, self.world.size, apart=self.apart, turns=self.turns)
        pieces = {}
        for bucket in self.buckets:
            for name in bucket.spans:
                parameter, master = held.parameters[name], held.masters[name]
                self.places[name] = bucket.place(name, parameter.shape)
                pieces[name] = self._piece(parameter, master, self.places[name].mine(self.world.rank))
        self.pieces = dict(sorted(pieces.items()))
        return self.pieces

    def publish(self, held: Held, names: Collection[str]) -> None:
        rank = self.world.rank
        for bucket in self.acting(names):
            first = held.parameters[next(iter(bucket.spans))]
            part = torch.zeros(bucket.part, dtype=first.dtype, device=first.device)
            for name in bucket.spans:
                part[bucket.mine(rank, name)[0]].copy_(self.pieces[name].detach())
            flat = part.new_empty(bucket.part * bucket.size)
            self.world.traffic.all_gather(flat, part)
            with torch.no_grad():
                for name in bucket.spans:
                    parameter = held.parameters[name]
                    parameter.copy_(bucket.get(flat, name).view(parameter.shape))

    def gradients(self) -> list[Tensor]:
        return [*super().gradients(), *(piece.grad for piece in self.pieces.values() if piece.grad is not None)]

    def scattered(self, flat: Tensor, bucket: Bucket) -> Tensor:
        """This process's part of the sum of all processes' buffers: [part]."""
        part = flat.new_empty(bucket.part)
        self.world.traffic.reduce_scatter(part, flat)
        return part

    def give(self, bucket: Bucket, part: Tensor, names: Collection[str]) -> None:
        """Makes a part of a bucket the gradient of its pieces."""
        for name in set(bucket.spans) & set(names):
            self.pieces[name].grad = part[bucket.mine(self.world.rank, name)[0]]

    @staticmethod
    def _piece(parameter: nn.Parameter, master: nn.Parameter, mine: slice) -> nn.Parameter:
        if master is parameter:
            return nn.Parameter(parameter.detach().view(-1)[mine])
        piece = nn.Parameter(master.detach().reshape(-1)[mine].clone())
        # it goes on to collect gradients of its shape; its values are in the pieces of all processes
        master.data = master.new_zeros(()).expand(master.shape)
        return piece


def refuse_watchers(tuned: Any) -> None:
    """Raises ConfigError for a method that looks at gradients after a step and remembers them: no process has all."""
    if getattr(tuned, "memory", {}):
        told = "the method looks at whole gradients after every step, and here each process has a part"
        raise ConfigError(told, where="layout.shard", hint="shard: none gives every process all of them")
