"""In what order the rows of a mixture are seen: a pure function of (seed, epoch, position).

An epoch is a keyed shuffle of its rows that is computed place by place, so no list of rows is ever held and
any place can be resumed from. What the places are grouped into is in `pack`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from tunesmith.core.errors import DataError
from tunesmith.core.rng import permute, seed_for


class Mixture:
    """Sources of rows, each seen `weight` times an epoch.

    Weight 1 is every row exactly once, 2 every row exactly twice, 0.25 a quarter of the rows. The quarters of
    successive epochs follow each other through one fixed shuffle, so that four epochs see every row once.

    Args:
        sizes: rows of each source.
        weights: how many times an epoch sees each source; all 1 when left out.
        seed: of the run; the stream is `data`.

    Raises: DataError where there is no row at all.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        self.sizes = tuple(sizes)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.sizes)
        if len(self.weights) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} sources but {len(self.weights)} weights")
        self.seed = seed
        counts = [_rows_an_epoch(size, weight) for size, weight in zip(self.sizes, self.weights, strict=True)]
        self._ends = list(accumulate(counts))
        if not self._ends or not self._ends[-1]:
            raise DataError("there is no row to learn from")

    def __len__(self) -> int:
        """Rows in one epoch, repeats counted."""
        return self._ends[-1]

    def pick(self, epoch: int, position: int) -> tuple[int, int]:
        """(source, row) at a place of an epoch. Raises IndexError outside the epoch."""
        place = permute(position, len(self), seed_for(self.seed, "data", epoch))
        source = bisect_right(self._ends, place)
        place -= self._ends[source - 1] if source else 0
        size = self.sizes[source]
        whole_rows = int(self.weights[source]) * size
        if place < whole_rows:
            return source, place % size
        part_rows = self._ends[source] - (self._ends[source - 1] if source else 0) - whole_rows
        turn = (epoch * part_rows + place - whole_rows) % size
        return source, permute(turn, size, seed_for(self.seed, "subset", source))


def _rows_an_epoch(size: int, weight: float) -> int:
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"a weight is a positive number, not {weight}")
    # at least one row, lest a small source with a small weight silently vanish
    return max(1, round(size * weight)) if size else 0
