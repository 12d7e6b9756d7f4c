"""A mean over seeds with its interval: Student's t, because three runs are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class OverSeeds:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        low, high: ends of the interval; None for one value, which says nothing about others.
        values: in the order of the seeds.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"n": len(self.values)}


def over_seeds(values: Sequence[float]) -> OverSeeds | None:
    """The mean of values with an interval that holds the mean of all seeds in 95 of 100 cases; None for no values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1:
        return OverSeeds(mean, None, None, tuple(values))
    reach = student(len(values) - 1) * stdev(values) / len(values) ** 0.5
    return OverSeeds(mean, mean - reach, mean + reach, tuple(values))


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t; beyond the table by its expansion, right to the third digit."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
