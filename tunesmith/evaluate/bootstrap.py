"""Intervals by resampling rows (Efron 1979; for metrics of text Koehn 2004, W04-3250).

A draw is how often each row was picked; counts times statistics are the sums that a metric turns into its value.
Draws depend on the seed and the number of rows only, so two systems on the same rows are resampled together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tunesmith.core.errors import DataError
from tunesmith.core.rng import seed_for

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats, Metric

DRAWS = 1000
# counts held at a time, so that many rows cost no more memory than few
_CELLS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value with the percentile interval of its resamples.

    Attributes:
        value: of all rows, not of the resamples.
        low, high: ends of the interval, at the level asked for.
        n: rows.
        signature: settings of the metric.
    """

    value: float
    low: float
    high: float
    n: int
    signature: str

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """For a difference: whether it is larger than chance at the level asked for."""
        return self.low > 0 or self.high < 0


def interval(metric: Metric, statistics: Floats, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """The metric of rows with statistics [rows, k] and its percentile interval. Raises DataError for no rows."""
    value = float(metric.value(_sum(statistics)))
    low, high = _ends(_resampled(metric, statistics, seed, draws), level)
    return Interval(value, low, high, len(statistics), metric.signature)


def difference(
    metric: Metric, ours: Floats, theirs: Floats, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> Interval:
    """Paired: ours minus theirs on the same rows, each draw applied to both. Raises DataError for unequal rows."""
    if len(ours) != len(theirs):
        raise DataError(f"a paired difference needs the same rows; there are {len(ours)} and {len(theirs)}")
    value = float(metric.value(_sum(ours)) - metric.value(_sum(theirs)))
    gaps = _resampled(metric, ours, seed, draws) - _resampled(metric, theirs, seed, draws)
    low, high = _ends(gaps, level)
    return Interval(value, low, high, len(ours), metric.signature)


def _sum(statistics: Floats) -> Floats:
    if len(statistics) == 0:
        raise DataError("there are no rows to score", hint="check data.eval and evaluate.rows")
    return statistics.sum(0)


def _resampled(metric: Metric, statistics: Floats, seed: int, draws: int) -> Floats:
    """Float64 [draws]: the metric of each resample."""
    import numpy as np

    sums = [counts @ statistics for counts in _draws(len(statistics), seed, draws)]
    return metric.value(np.concatenate(sums))


def _draws(rows: int, seed: int, draws: int) -> Iterator[Floats]:
    """Float64 [some draws, rows]: how often each row is picked; every line adds up to `rows`."""
    import numpy as np

    random = np.random.default_rng(seed_for(seed, "evaluation", "bootstrap", rows))
    share = np.full(rows, 1.0 / rows)
    at_once = max(1, _CELLS // rows)
    for start in range(0, draws, at_once):
        yield random.multinomial(rows, share, size=min(at_once, draws - start)).astype(np.float64)


def _ends(values: Floats, level: float) -> tuple[float, float]:
    import numpy as np

    # a resample of rows without tokens has no value; it says nothing about the others
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
