"""What a layout of several processes makes of a plan: the bytes that each of them holds, and sends in a step.

The accounts are those of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, sections 5 and 7), taken from the tensors
that were counted rather than from psi: 2 psi sent for ddp, zero1 and zero2, 3 psi for zero3, times (N - 1) / N, which
is what of it leaves a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.parallel.layout import Shard
from tunesmith.plan.memory import Memory, TensorSpec
from tunesmith.plan.plan import Plan


@dataclass(frozen=True)
class Spread:
    """A layout as a plan needs it.

    Attributes:
        processes: how many share the rows of a step.
        shard: what is split between them.
        micro_batches: of a step, of the process that has most, on average.
    """

    processes: int
    shard: Shard
    micro_batches: float = 1.0

    def applied(self, plan: Plan, specs: Sequence[TensorSpec]) -> Plan:
        """The plan of one of the processes; `seconds` as if each had a machine like this one, without communication.

        Args:
            specs: the tensors of the adapted model.
        """
        if self.processes == 1:
            return plan
        memory = self.memory(plan.memory, specs)
        seconds = None if plan.seconds is None else plan.seconds / self.processes
        sent = self.sent_bytes(plan.memory, specs)
        told: dict[str, Any] = {
            "processes": self.processes,
            "shard": self.shard,
            "micro_batches": self.micro_batches,
            "sent_bytes": sum(sent.values()),
            **{f"{kind}_sent_bytes": count for kind, count in sent.items()},
        }
        return replace(plan, memory=memory, seconds=seconds, layout=told)

    def memory(self, whole: Memory, specs: Sequence[TensorSpec]) -> Memory:
        """What one process holds, without buffers in which tensors are sent, and the block that zero3 has whole."""
        level = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}[self.shard]
        spread = replace(
            whole,
            weights_bytes=self._weights_bytes(whole, specs) if level >= 3 else whole.weights_bytes,
            master_bytes=self._part(whole.master_bytes) if level >= 1 else whole.master_bytes,
            gradients_bytes=self._part(whole.gradients_bytes) if level >= 2 else whole.gradients_bytes,
            optimizer_bytes=self._part(whole.optimizer_bytes) if level >= 1 else whole.optimizer_bytes,
            checkpoint_bytes=self._part(whole.checkpoint_bytes) if level >= 1 else whole.checkpoint_bytes,
        )
        saved = whole.state_bytes - spread.state_bytes
        peak = max(whole.peak_bytes - saved, spread.state_bytes) if whole.peak_bytes else 0
        return replace(spread, peak_bytes=peak)

    def sent_bytes(self, whole: Memory, specs: Sequence[TensorSpec]) -> dict[str, int]:
        """Bytes that a process sends in a step, by collective."""
        weights = sum(spec.nbytes for spec in specs if not spec.buffer)
        trained = sum(spec.nbytes for spec in specs if spec.trainable)
        gradients, times = whole.gradients_bytes, self.micro_batches
        sent: dict[Shard, dict[str, float]] = {
            "none": {"all_reduce": 2 * gradients},
            "zero1": {"reduce_scatter": gradients, "all_gather": trained},
            # a reduction for each micro-batch, so that no gradient waits for the next one
            "zero2": {"reduce_scatter": times * gradients, "all_gather": trained},
            # gathered for the forward and once more for the backward
            "zero3": {"reduce_scatter": times * gradients, "all_gather": times * 2 * weights},
        }
        share = (self.processes - 1) / self.processes
        return {kind: round(count * share) for kind, count in sent[self.shard].items()}

    def _weights_bytes(self, whole: Memory, specs: Sequence[TensorSpec]) -> int:
        """What trains in fewer than 32 bits is held as its master alone."""
        buffers = sum(spec.nbytes for spec in specs if spec.buffer)
        low = sum(spec.nbytes for spec in specs if spec.trainable and spec.item_bytes < 4) if whole.master_bytes else 0
        return buffers + self._part(whole.weights_bytes - buffers - low)

    def _part(self, nbytes: int) -> int:
        return -(-nbytes // self.processes)
