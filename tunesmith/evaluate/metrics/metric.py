"""What a metric is: rows become additive numbers, sums of those become the value.

Because a corpus score is a function of a sum over rows, an interval by resampling rows costs one matrix product
(`tunesmith.evaluate.bootstrap`). The metrics themselves are one file a group beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tunesmith.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Score:
    """A value and the settings that it was computed with.

    Attributes:
        value: on the scale that the signature names.
        signature: tokeniser, case, smoothing, scale: whatever changes the number.
    """

    value: float
    signature: str


class Metric:
    """One number about the completions of a data set.

    Attributes:
        name: as in the configuration.
        needs: `completions` are scored against references; `predictions` are labels or scores, be they those of a
            head or written out; `losses` are nothing but the model's own; `teacher` is a model to be like.
        higher_is_better: which way is an improvement.
        reads_tables: whether `tables`, what each row has under its key `table`, is to be set before rows are scored.
    """

    name: ClassVar[str]
    needs: ClassVar[Literal["completions", "predictions", "losses", "teacher"]] = "completions"
    higher_is_better: ClassVar[bool] = True
    reads_tables: ClassVar[bool] = False
    tables: Sequence[str] = ()

    @property
    def signature(self) -> str:
        raise NotImplementedError

    def require(self) -> None:
        """Raises ConfigError when the machine lacks what the metric needs; called before any model runs."""

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        """Float64 [rows, k]: what each row adds. Quantities of the whole reference set (document frequencies,
        information weights) are fixed here and are not resampled."""
        raise NotImplementedError

    def value(self, sums: Floats) -> Floats:
        """Float64 [...]: the metric of sums [..., k] of statistics."""
        raise NotImplementedError

    def score(self, completions: Sequence[str], references: References) -> Score:
        """The metric of all rows. Raises DataError when there are no rows or a row has no reference."""
        check_rows(completions, references)
        return Score(float(self.value(self.statistics(completions, references).sum(0))), self.signature)


class RowMean(Metric):
    """A metric that is the mean of a number per row; subclasses give `rows`."""

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        """One number a row, on the scale of the metric."""
        raise NotImplementedError

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        import numpy as np

        rows = np.asarray(self.rows(completions, references), dtype=np.float64)
        return np.stack([rows, np.ones_like(rows)], axis=1)

    def value(self, sums: Floats) -> Floats:
        return sums[..., 0] / sums[..., 1]


def check_rows(completions: Sequence[str], references: References) -> None:
    """Raises DataError for no rows, lists of unequal length, or a row without references."""
    if len(completions) != len(references):
        raise DataError(f"{len(completions)} completions, but references for {len(references)} rows")
    if not completions:
        raise DataError("there are no rows to score", hint="check data.eval and evaluate.rows")
    bare = next((row for row, several in enumerate(references) if not several), None)
    if bare is not None:
        raise DataError(f"row {bare + 1} has no reference to compare with")
