"""Where the numbers of a piece lie in the whole tensor, and what 8-bit moments and chance make of it.

The one idea: blocks begin where those of the whole do, and every number draws chance of its own. So codes, scales and
checkpoints are those of one process, whoever has which numbers; only a block that two processes have some of needs a
word between them, its largest magnitude (`compact.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.core.moments import BLOCK
from tunesmith.core.rng import torch_generator

if TYPE_CHECKING:
    from tunesmith.parallel.layout import Layout

DRAWN = 1 << 14  # numbers of a tensor whose chance is drawn together


@dataclass(frozen=True)
class Spot:
    """Where a piece lies.

    Attributes:
        numbers: of the whole tensor.
        runs: of the piece's numbers in the whole: first and behind the last of each.
        shared: blocks of the whole that several processes have numbers of.
    """

    numbers: int
    runs: Sequence[tuple[int, int]]
    shared: Sequence[int]

    @property
    def lead(self) -> int:
        """Numbers of others before the piece in its first block."""
        first, end = self.runs[0]
        return first % BLOCK if end > first else 0

    def within(self, block: int) -> slice:
        """The numbers of the piece in a block of the whole."""
        first, end = self.runs[0]
        begin = min(max(first, block * BLOCK), end)
        return slice(begin - first, max(begin, min(end, (block + 1) * BLOCK)) - first)

    def place(self, block: int) -> int:
        """Which of the piece's blocks a block of the whole is."""
        return block - self.runs[0][0] // BLOCK

    def chance(self, seed: int, stream: str, *indices: int | str) -> Tensor:
        """A float32 number in [0, 1) for each of the piece's, a function of its place in the whole."""
        found, chunk, drawn = [torch.empty(0)], -1, torch.empty(0)
        for first, end in self.runs:
            while first < end:
                if first // DRAWN != chunk:
                    chunk = first // DRAWN
                    drawn = torch.rand(DRAWN, generator=torch_generator(seed, stream, *indices, chunk))
                stop = min(end, (chunk + 1) * DRAWN)
                found.append(drawn[first - chunk * DRAWN : stop - chunk * DRAWN])
                first = stop
        return torch.cat(found)


def spots(layout: Layout, pieces: dict[str, torch.nn.Parameter]) -> dict[str, Spot]:
    """Where all pieces of a process lie; every process asks."""
    wholes = layout.wholes(pieces)
    return {
        name: Spot(
            torch.Size(wholes[name][1]).numel(),
            layout.runs(name, piece),
            sorted({cut // BLOCK for cut in layout.cuts(name) if cut % BLOCK}),
        )
        for name, piece in pieces.items()
    }
