"""What moving bytes takes: a link as latency and bandwidth, collectives over N processes as steps on such links.

The one idea: time = steps x latency + bytes of a step / bandwidth (Hockney 1994), the steps those of the textbook's
rings and trees (Thakur, Rabenseifner and Gropp 2005; Patarasuk and Yuan 2009). `fit` finds the two numbers of a link
from times that were measured. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link in one direction.

    Attributes:
        bytes_per_second: once it flows.
        seconds: before it flows, for each message.
    """

    bytes_per_second: float
    seconds: float

    def message(self, nbytes: float) -> float:
        """Seconds for one message."""
        return self.seconds + nbytes / self.bytes_per_second


def all_gather(link: Link, size: int, nbytes: float) -> float:
    """Seconds until each of `size` processes has all of `nbytes`, of which each had its part: a ring."""
    steps, moved = _scatter(size, nbytes)
    return steps * link.seconds + moved / link.bytes_per_second


def reduce_scatter(link: Link, size: int, nbytes: float) -> float:
    """Seconds until each of `size` processes has its part of the sum of `nbytes`: the same ring, backwards."""
    return all_gather(link, size, nbytes)


def all_reduce(link: Link, size: int, nbytes: float) -> float:
    """Seconds until each of `size` processes has the sum of `nbytes`: a ring, or a tree where that is faster.

    The tree sends everything up and down its levels: few steps for small messages.
    """
    ring = 2 * all_gather(link, size, nbytes)
    levels = (size - 1).bit_length()
    return min(ring, 2 * levels * link.message(nbytes))


def coefficients(kind: str, size: int, nbytes: float) -> tuple[int, float]:
    """Steps and bytes that one process sends in them, so that seconds = steps x latency + bytes / bandwidth.

    Args:
        kind: all_gather, reduce_scatter, all_reduce (as a ring) or send.
    """
    steps, moved = (1, nbytes) if kind == "send" else _scatter(size, nbytes)
    return (2 * steps, 2 * moved) if kind == "all_reduce" else (steps, moved)


def fit(measured: Sequence[tuple[int, float, float]]) -> Link:
    """The link that explains measured times best, by least squares of relative errors.

    Args:
        measured: (steps, bytes, seconds) of each; steps and bytes as `coefficients` gives them.

    A latency or a time for a byte below zero is no link: then the other alone is fitted.
    """
    # both columns and the answer over the seconds: 1 % of a short time weighs as much as 1 % of a long one
    rows = [(steps / seconds, nbytes / seconds) for steps, nbytes, seconds in measured]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    latency = (a * bb - b * ab) / determinant if determinant else 0.0
    each = (b * aa - a * ab) / determinant if determinant else b / bb
    if latency < 0:
        latency, each = 0.0, b / bb
    if each <= 0:
        latency, each = a / aa, 1e-15
    return Link(1 / each, latency)


def _scatter(size: int, nbytes: float) -> tuple[int, float]:
    return size - 1, nbytes * (size - 1) / size
