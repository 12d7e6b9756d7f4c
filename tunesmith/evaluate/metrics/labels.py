"""Metrics of predicted labels and scores: those of GLUE (Wang et al. 2018, arXiv 1804.07461), on a scale of 100.

The one idea: a row is a tuple of labels (one of a text, one for each of its words), predicted and true, and becomes
counts that add up over rows. Answers that a model has written out count as labels, too, compared without case.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from tunesmith.core.errors import DataError
from tunesmith.evaluate.metrics.losses import Loss
from tunesmith.evaluate.metrics.metric import Metric, References

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats

Labels = Sequence[Sequence[str]]


class Judged(Metric):
    """A metric of predictions; of written answers the first reference is the label."""

    needs = "predictions"

    def from_labels(self, predicted: Labels, true: Labels) -> Floats:
        """Float64 [rows, k]: what each row adds. Raises DataError for a label that the metric cannot use."""
        raise NotImplementedError

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        predicted = [(_plain(text),) for text in completions]
        return self.from_labels(predicted, [(_plain(several[0]),) for several in references])


class LabelAccuracy(Judged):
    name = "accuracy"

    @property
    def signature(self) -> str:
        return "label:equal|by:label|scale:100"

    def from_labels(self, predicted: Labels, true: Labels) -> Floats:
        import numpy as np

        right = [sum(map(str.__eq__, *row)) for row in zip(predicted, true, strict=True)]
        return np.array([right, [len(row) for row in true]], dtype=np.float64).T

    def value(self, sums: Floats) -> Floats:
        return 100 * sums[..., 0] / sums[..., 1]


class LabelF1(Judged):
    """F1 = 2 tp / (2 tp + fp + fn); 0 for a label that is neither there nor predicted."""

    name = "f1"

    @property
    def signature(self) -> str:
        return "label:the last of two in their order, else the mean over those there are|by:label|scale:100"

    def from_labels(self, predicted: Labels, true: Labels) -> Floats:
        import numpy as np

        labels = ordered(true)
        columns = []
        for label in labels[-1:] if len(labels) <= 2 else labels:
            counts = [_hits(label, *row) for row in zip(predicted, true, strict=True)]
            columns.append(np.array(counts, dtype=np.float64))
        return np.concatenate(columns, axis=1)

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        hits = sums.reshape(*sums.shape[:-1], -1, 3)
        total = 2 * hits[..., 0] + hits[..., 1] + hits[..., 2]
        return 100 * (2 * hits[..., 0] / np.where(total == 0, 1, total)).mean(-1)


class Matthews(Judged):
    """Matthews correlation; of more than two labels R_K (Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006).

    From how often each label is predicted and is true and how often both agree, which add up over rows.
    """

    name = "matthews"

    @property
    def signature(self) -> str:
        return "R_K over all labels|a constant side:0|scale:100"

    def from_labels(self, predicted: Labels, true: Labels) -> Floats:
        import numpy as np

        labels = {label: place for place, label in enumerate(ordered([*predicted, *true]))}
        size = len(labels)
        rows = np.zeros((len(true), 2 + 2 * size))
        for row, pairs in zip(rows, zip(predicted, true, strict=True), strict=True):
            for ours, theirs in zip(*pairs, strict=True):
                row[0] += ours == theirs
                row[1] += 1
                row[2 + labels[ours]] += 1
                row[2 + size + labels[theirs]] += 1
        return rows

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        agreed, total = sums[..., 0], sums[..., 1]
        ours, theirs = np.split(sums[..., 2:], 2, axis=-1)
        above = agreed * total - (ours * theirs).sum(-1)
        below = (total**2 - (ours**2).sum(-1)) * (total**2 - (theirs**2).sum(-1))
        return _ratio(above, below)


class Pearson(Judged):
    name = "pearson"

    @property
    def signature(self) -> str:
        return "a constant side:0|scale:100"

    def from_labels(self, predicted: Labels, true: Labels) -> Floats:
        import numpy as np

        # from the mean of all rows, so that squares of large numbers do not cancel
        x, y = (self.scale(numbers(rows)) for rows in (predicted, true))
        x, y = x - x.mean(), y - y.mean()
        return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)

    def scale(self, values: Floats) -> Floats:
        """What is correlated of the values: they themselves."""
        return values

    def value(self, sums: Floats) -> Floats:
        n, x, y, xx, yy, xy = (sums[..., column] for column in range(6))
        return _ratio(n * xy - x * y, (n * xx - x * x) * (n * yy - y * y))


class Spearman(Pearson):
    """Pearson of ranks; equal values share the mean of theirs."""

    name = "spearman"

    @property
    def signature(self) -> str:
        return "ranks:of all rows, not of each resample|ties:mean rank|a constant side:0|scale:100"

    def scale(self, values: Floats) -> Floats:
        import numpy as np

        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = counts.cumsum()
        return ((ends - counts + 1 + ends) / 2)[places]


class HeadLoss(Loss):
    """The loss that a head is trained on."""

    @property
    def signature(self) -> str:
        return "of a label: nats|of a score: squared error|by:label"


def ordered(rows: Labels) -> list[str]:
    """All labels of some rows, whole numbers by size, others alphabetically."""
    found = set(chain.from_iterable(rows))
    numeric = all(label.removeprefix("-").isdecimal() for label in found)
    return sorted(found, key=int) if numeric else sorted(found)


def numbers(rows: Labels) -> Floats:
    """The one number of each row. Raises DataError naming the first that is none."""
    import numpy as np

    found = []
    for place, row in enumerate(rows):
        try:
            found.append(float(row[0]))
        except ValueError as error:
            hint = "accuracy, f1 and matthews are of classes"
            message = f"row {place + 1}: {row[0][:80]!r} is no number, and a correlation is of numbers"
            raise DataError(message, hint=hint) from error
    values = np.array(found, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("a score is not finite")
    return values


def _hits(label: str, predicted: Sequence[str], true: Sequence[str]) -> tuple[int, int, int]:
    """True positives, false positives and false negatives of a label in one row."""
    pairs = list(zip(predicted, true, strict=True))
    both = sum(ours == theirs == label for ours, theirs in pairs)
    return both, sum(ours == label for ours, _ in pairs) - both, sum(theirs == label for _, theirs in pairs) - both


def _ratio(above: Floats, square_below: Floats) -> Floats:
    """100 above / sqrt(below), 0 where nothing varies."""
    import numpy as np

    varied = square_below > 1e-12
    return np.where(varied, 100 * above / np.sqrt(np.where(varied, square_below, 1)), 0.0)


def _plain(text: str) -> str:
    return text.strip().casefold()
