"""Uneven shares that even out time: blocks over the stages of a pipeline, micro-batches over its replicas.

The one idea: whoever is slowest decides, so the largest time is made as small as whole blocks and whole micro-batches
allow: exactly, for stages by dynamic programming, for replicas by giving each next micro-batch to who ends first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import inf


def split_blocks(blocks: int, stages: int, seconds: Callable[[int, int, int], float]) -> list[int] | None:
    """How many of the blocks each stage gets, in order, so that the slowest takes least; None where none is possible.

    Args:
        seconds: of stage s with blocks i to j - 1: `seconds(s, i, j)`; infinite where they do not fit. Must not fall
            when a block is added at either end. A stage may get none.
    """
    best = [0.0] + [inf] * blocks  # of the first j blocks on the stages so far
    cuts: list[list[int]] = []
    for stage in range(stages):
        found = [_best_cut(best, stage, end, seconds) for end in range(blocks + 1)]
        best = [slowest for slowest, _ in found]
        cuts.append([cut for _, cut in found])
    if best[blocks] == inf:
        return None
    counts, end = [], blocks
    for places in reversed(cuts):
        counts.append(end - places[end])
        end = places[end]
    return counts[::-1]


def _best_cut(
    best: Sequence[float], stage: int, end: int, seconds: Callable[[int, int, int], float]
) -> tuple[float, int]:
    """The slowest stage of the first `end` blocks, the last of them on `stage`, and where that begins."""
    # what lies before rises with the cut and what the stage itself takes falls: the best cut is where they cross
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        if best[middle] >= seconds(stage, middle, end):
            high = middle
        else:
            low = middle + 1
    return min((max(best[cut], seconds(stage, cut, end)), cut) for cut in (max(0, low - 1), low))


def share_out(total: int, seconds: Sequence[float], before: Sequence[float], most: Sequence[int]) -> list[int] | None:
    """How many of `total` micro-batches each replica gets so that the last ends earliest; None where they are too many.

    Args:
        seconds: of each replica for a micro-batch.
        before: what each takes once, whatever it gets.
        most: how many each has memory for.
    """
    if sum(most) < total:
        return None
    counts = [0] * len(seconds)
    queue = [(before[index] + each, index) for index, each in enumerate(seconds) if most[index]]
    heapq.heapify(queue)
    for _ in range(total):
        ends, index = heapq.heappop(queue)
        counts[index] += 1
        if counts[index] < most[index]:
            heapq.heappush(queue, (ends + seconds[index], index))
    return counts
