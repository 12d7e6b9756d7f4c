"""What both workers of a benchmark share: taking turns with the other one, and measuring themselves.

The one idea: a worker is one long training run that stops between two steps until it is told to do some more. So both
libraries go through their own loops, and still every block of steps of one is followed by the same block of the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Measured:
    """One update.

    Attributes:
        loss: mean over its supervised tokens, before the update.
        supervised_tokens: tokens whose loss was in it, as the library itself counted them.
    """

    loss: float
    supervised_tokens: int


class Turns:
    """The worker's end of a pair of pipes; one JSON document a line each way.

    Everything a library prints to stdout goes to stderr, so that it cannot get between the lines.

    Args:
        probe: GFLOP/s that the machine gives right now; asked before and after every block.
    """

    def __init__(self, probe: Callable[[], float] = lambda: ceiling()) -> None:
        self.probe = probe
        self.live_bytes: Callable[[], int] | None = None
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.steps: list[Measured] = []
        self.left = 0
        self.before = 0.0
        self.wall = self.cpu = 0.0

    def tell(self, **what: Any) -> None:
        """Sends a document to the parent."""
        self.out.write(json.dumps(what) + "\n")
        self.out.flush()

    def begin(self) -> None:
        """Waits for a block. Called once before the first step."""
        line = sys.stdin.readline()
        self.left = int(json.loads(line)["steps"]) if line else 0
        if not self.left:
            sys.exit(0)
        self.before = self.probe()
        self.steps, self.wall, self.cpu = [], time.perf_counter(), time.process_time()

    def step(self, done: Measured, last: bool) -> None:
        """Notes a finished step; at the end of a block reports it and, unless it was the last, waits for the next."""
        self.steps.append(done)
        self.left -= 1
        if self.left:
            return
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.tell(
            steps=[asdict(step) for step in self.steps],
            wall_seconds=wall,
            cpu_seconds=cpu,
            ceiling_gflops=[self.before, self.probe()],
            peak_bytes=peak_bytes(),
            tensor_bytes=self.live_bytes() if self.live_bytes else None,
        )
        if not last:
            self.begin()


def peak_bytes() -> int:
    """The most memory this process has held."""
    # not getrusage: its peak outlives exec, so that it could be the parent's
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def ceiling(dtype: str = "bf16", device: str = "cpu", size: int = 1024) -> float:
    """What the machine gives right now: GFLOP/s of matrix products that fit its caches, the best of about 40 ms."""
    from benchmarks.roofline import product_rate

    return product_rate(size, size, size, dtype, 0.04, device) / 1e9


@contextmanager
def counting(turns: Turns, model: Any, wanted: bool) -> Iterator[None]:
    """Counts the bytes of tensors alive at once within, those of the model included; too slow to be timed as well."""
    if not wanted:
        yield
        return
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    before = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    turns.probe = lambda: 0.0
    with live_storages() as live:
        turns.live_bytes = lambda: before + live.peak_all_bytes
        yield


@contextmanager
def live_storages() -> Iterator[Any]:
    """tunesmith's own counting of tensors made within, over a run that has data."""
    from tunesmith.plan.trace import LiveStorages

    with LiveStorages() as live:
        yield live
