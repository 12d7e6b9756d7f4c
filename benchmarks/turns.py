"""What both workers of a benchmark share: taking turns with the other one, and measuring themselves.

The one idea: a worker is one long training run that stops between two steps until it is told to do some more. So both
libraries go through their own loops, and still every block of steps of one is followed by the same block of the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
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
    """

    def __init__(self) -> None:
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.steps: list[Measured] = []
        self.left = 0
        self.ceiling = self.before = 0.0
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
        self.before = ceiling()
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
            ceiling_gflops=[self.before, ceiling()],
            peak_bytes=peak_bytes(),
        )
        if not last:
            self.begin()


def peak_bytes() -> int:
    """The most memory this process has held."""
    # not getrusage: its peak outlives exec, so that it could be the parent's
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def ceiling() -> float:
    """What the machine gives right now: GFLOP/s of bfloat16 matrix products, about 30 ms of them."""
    import torch

    a = torch.ones(1024, 1024, dtype=torch.bfloat16)
    a @ a
    began = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.perf_counter() - began) / 1e9
