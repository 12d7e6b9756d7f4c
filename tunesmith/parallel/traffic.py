"""The collectives of a run, counted where they are called: bytes that a process sends, and the time it waits.

A ring moves (N - 1) / N of a buffer out of every process to scatter its sums or to gather it, and twice that for an
all-reduce, which is one after the other (Patarasuk and Yuan 2009). What is counted is this, whatever way a backend
takes. Small messages by which processes agree on numbers are a kind of their own, `control`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# their names since torch 2.12, and the older ones
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Traffic:
    """The collectives of one process, by kind.

    Attributes:
        sent_bytes: by kind: all_reduce, reduce_scatter, all_gather, activations (and their gradients), control, and
            copies (of checkpoints).
        seconds: spent in calls of all of them, waiting for slower processes included.

    Args:
        size: processes that take part.
        group: torch's name for them; None for all of the run.
        ledger: where it is counted, for a group within a run; None counts here.
    """

    def __init__(self, size: int, group: Any = None, ledger: Traffic | None = None) -> None:
        self.size, self.group, self.ledger = size, group, ledger or self
        self.sent_bytes: dict[str, int] = {}
        self.seconds = 0.0
        self._taken: dict[str, int] = {}
        self._taken_seconds = 0.0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, kind: str = "all_reduce") -> None:
        """Every process gets the sum (or another `op`) in place."""
        with self._timed(kind, 2 * tensor.nbytes):
            dist.all_reduce(tensor, op, group=self.group)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None:
        """This process gets its part of the sum of `whole` [N x part]."""
        with self._timed("reduce_scatter", whole.nbytes):
            _reduce_scatter(part, whole, group=self.group)

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """Every process gets all parts in `whole` [N x part]."""
        with self._timed("all_gather", whole.nbytes):
            _gather_into(whole, part, group=self.group)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Every process gets one's tensor, in place; a small message."""
        with self._timed("control", tensor.nbytes):
            dist.broadcast(tensor, group_src=source, group=self.group)

    def send(self, tensor: Tensor, to: int) -> None:
        """A copy for one other process."""
        self.count("copies", tensor.nbytes)
        dist.send(tensor, group_dst=to, group=self.group)

    def receive(self, tensor: Tensor, source: int) -> None:
        """What one other process sends."""
        dist.recv(tensor, group_src=source, group=self.group)

    def count(self, kind: str, nbytes: int) -> None:
        """Adds what another engine than this one sends."""
        sent = self.ledger.sent_bytes
        sent[kind] = sent.get(kind, 0) + nbytes

    def take(self) -> tuple[dict[str, int], float]:
        """Bytes by kind and seconds since it was asked before."""
        found = {kind: count - self._taken.get(kind, 0) for kind, count in self.sent_bytes.items()}
        seconds, self._taken_seconds = self.seconds - self._taken_seconds, self.seconds
        self._taken = dict(self.sent_bytes)
        return {kind: count for kind, count in found.items() if count}, seconds

    @contextmanager
    def _timed(self, kind: str, nbytes: int) -> Iterator[None]:
        self.count(kind, nbytes * (self.size - 1) // self.size)
        began = time.perf_counter()
        yield
        self.ledger.seconds += time.perf_counter() - began


class CountedAllGather:
    """FSDP2's all-gather, counted (`FSDPModule.set_custom_all_gather`)."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with self.traffic._timed("all_gather", output_tensor.nbytes):
            return _gather_into(output_tensor, input_tensor, group=group, async_op=async_op)


class CountedReduceScatter(CountedAllGather):
    """FSDP2's reduce-scatter, counted (`FSDPModule.set_custom_reduce_scatter`)."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        with self.traffic._timed("reduce_scatter", input_tensor.nbytes):
            return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
