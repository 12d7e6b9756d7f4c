"""Which rows of a step each process computes: dealt evenly by tokens, a pure function of the step.

The rows of a step are those of one process. The longest are dealt first, each to the process with the fewest tokens
so far (Graham 1969); a process keeps the order of the step and cuts its own rows into micro-batches. One that gets
none has a spare row, the shortest of the step, for layouts in which all must compute at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from tunesmith.data.pack import Encoded, Sizes, Step, cut, cut_into

E = TypeVar("E", bound=Encoded)


def dealt(steps: Iterable[Step[E]], sizes: Sizes, rank: int, size: int) -> Iterator[Step[E]]:
    """Each step with the micro-batches of one process out of `size`."""
    for step in steps:
        hands = deal(step, size)
        shortest = min((row for rows in step.micro_batches for row in rows), key=lambda row: len(row.ids))
        yield replace(step, micro_batches=cut(hands[rank], sizes), spare=[shortest])


def cut_again(steps: Iterable[Step[E]], count: int) -> Iterator[Step[E]]:
    """Each step cut into at most `count` micro-batches, whatever cut it before."""
    for step in steps:
        rows = [row for batch in step.micro_batches for row in batch]
        yield replace(step, micro_batches=cut_into(rows, count))


def deal(step: Step[E], size: int) -> list[list[E]]:
    """The rows of every process."""
    rows = [row for batch in step.micro_batches for row in batch]
    hands: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for index in sorted(range(len(rows)), key=lambda index: (-len(rows[index].ids), index)):
        least = min(range(size), key=lambda rank: (tokens[rank], rank))
        hands[least].append(index)
        tokens[least] += len(rows[index].ids)
    return [[rows[index] for index in sorted(hand)] for hand in hands]
