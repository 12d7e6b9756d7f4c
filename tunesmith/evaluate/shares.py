"""Shares of judged pairs, with intervals that know that pairs of one prompt are no independent evidence.

The interval is Wilson's (1927, JASA 22), which is honest near 0 and 1 and for few prompts, with the effective sample
size of clustered data in place of the number of pairs (Korn and Graubard 1998, Survey Methodology 24).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tunesmith.evaluate.bootstrap import Interval

Z = 1.959963984540054  # 95 %
SIGNATURE = "95 %: Wilson 1927, effective sample size over prompts"


def share(points: Iterable[tuple[int, float]]) -> Interval | None:
    """The mean of (prompt, points from 0 to 1) of every pair; None where there is none. `n` counts prompts."""
    sums: dict[int, list[float]] = {}
    for prompt, value in points:
        row = sums.setdefault(prompt, [0.0, 0.0])
        row[0] += value
        row[1] += 1
    if not sums:
        return None
    pairs = sum(count for _, count in sums.values())
    mean = sum(total for total, _ in sums.values()) / pairs
    low, high = wilson(mean, effective(mean, list(sums.values())))
    return Interval(mean, low, high, len(sums), SIGNATURE)


def effective(mean: float, sums: list[list[float]]) -> float:
    """As how many independent pairs the (sum, count) of each prompt are worth: the variance says it.

    Where nothing varies, as in 12 wins of 12, it is the number of prompts; it is never more than the number of pairs.
    """
    pairs = sum(count for _, count in sums)
    if len(sums) < 2:
        return 1.0
    squares = sum((total - mean * count) ** 2 for total, count in sums)
    variance = len(sums) / (len(sums) - 1) * squares / pairs**2
    return float(len(sums)) if variance <= 1e-15 else min(pairs, mean * (1 - mean) / variance)


def wilson(mean: float, n: float) -> tuple[float, float]:
    """The ends of the interval of a share that was seen in n."""
    middle = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
