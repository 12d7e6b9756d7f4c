"""How far annotators agree: Cohen's and Fleiss' kappa, Krippendorff's alpha, tie-discounted accuracy. Without torch.

The one idea: each coefficient is a function of counts that add up over prompts, so its interval comes from resampling
prompts (`bootstrap`), and what one prompt's answers have in common does not count twice. A unit is two answers to a
prompt; its label is -1, 0 or 1: the second is better, neither is (a tie, or both bad), the first is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING

from tunesmith.core.judged import Judged
from tunesmith.evaluate.bootstrap import DRAWS, Interval, interval
from tunesmith.evaluate.metrics.metric import Metric
from tunesmith.evaluate.shares import share

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats

LABELS = (-1, 0, 1)
FEW = 200  # draws where many intervals are asked for
Unit = tuple[int, tuple[str, str], tuple[str, str]]  # prompt, and (system, text) of each answer
Ratings = dict[Unit, dict[str, int]]  # unit -> annotator -> label


def ratings(judged: Iterable[Judged]) -> Ratings:
    """The label that each annotator gave to each pair of answers; skipped prompts are not in it."""
    found: Ratings = {}
    for one in judged:
        if one.kind == "skip":
            continue
        ranked = sorted(zip(zip(one.systems, one.texts, strict=True), one.ranks, strict=True))
        for (first, rank), (second, its) in combinations(ranked, 2):
            if first != second:
                label = (its > rank) - (its < rank)
                found.setdefault((one.prompt, first, second), {})[one.annotator] = label
    return found


class Agreement(Metric):
    """A chance-corrected coefficient of counts [..., 9]: `rows` by `columns` of labels, one row of counts a prompt."""

    name = "agreement"

    def __init__(self, signature: str) -> None:
        self._signature = signature

    @property
    def signature(self) -> str:
        return self._signature

    def counts(self, labels: list[int]) -> list[float]:
        """What the labels of one unit add, nine numbers; nothing for a unit with fewer than two."""
        raise NotImplementedError

    def measure(self, found: Iterable[tuple[int, list[int]]], draws: int = DRAWS) -> Interval | None:
        """The coefficient of (prompt, labels of a unit); None where it is not defined, as with one label alone."""
        import numpy as np

        by_prompt: dict[int, list[float]] = {}
        for prompt, labels in found:
            if len(labels) > 1:
                row = by_prompt.setdefault(prompt, [0.0] * 9)
                by_prompt[prompt] = [one + other for one, other in zip(row, self.counts(labels), strict=True)]
        rows = np.array(list(by_prompt.values()))
        if not by_prompt or np.isnan(self.value(rows.sum(0))):
            return None
        return interval(self, rows, draws=draws)


class Cohen(Agreement):
    """Cohen's kappa of two annotators (Cohen 1960): agreement beyond what their own shares of labels give."""

    def counts(self, labels: list[int]) -> list[float]:
        return [float(labels == [row, column]) for row in LABELS for column in LABELS]

    def value(self, sums: Floats) -> Floats:
        table = sums.reshape(*sums.shape[:-1], 3, 3)
        total = table.sum((-1, -2))
        agreed = table.trace(axis1=-2, axis2=-1) / total
        expected = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
        return _corrected(agreed, expected)


class Fleiss(Agreement):
    """Fleiss' kappa of any number of annotators (Fleiss 1971, eqs. 3 to 7).

    Differs from it where units have unequal numbers of labels: each has its own number in eq. 3.
    """

    def counts(self, labels: list[int]) -> list[float]:
        n = len(labels)
        each = [labels.count(label) for label in LABELS]
        agreed = sum(count * (count - 1) for count in each) / (n * (n - 1))
        return [agreed, 1.0, *map(float, each), 0.0, 0.0, 0.0, 0.0]

    def value(self, sums: Floats) -> Floats:
        shares = sums[..., 2:5] / sums[..., 2:5].sum(-1, keepdims=True)
        return _corrected(sums[..., 0] / sums[..., 1], (shares**2).sum(-1))


class Krippendorff(Agreement):
    """Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"), missing labels allowed.

    Args:
        ordinal: a tie is half-way between the answers, by its ordinal metric; else labels only differ or not.
    """

    def __init__(self, signature: str, *, ordinal: bool = False) -> None:
        super().__init__(signature)
        self.ordinal = ordinal

    def counts(self, labels: list[int]) -> list[float]:
        each = {label: labels.count(label) for label in LABELS}
        pairs = len(labels) - 1
        return [each[one] * (each[other] - (one == other)) / pairs for one in LABELS for other in LABELS]

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        coincidences = sums.reshape(*sums.shape[:-1], 3, 3)
        each = coincidences.sum(-1)
        total = each.sum(-1)
        distance = self._distance(each)
        observed = (coincidences * distance).sum((-1, -2)) / total
        expected = (each[..., :, None] * each[..., None, :] * distance).sum((-1, -2)) / (total * (total - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(expected > 0, 1 - observed / expected, np.nan)

    def _distance(self, each: Floats) -> Floats:
        """[..., 3, 3]: how far labels are apart."""
        import numpy as np

        if not self.ordinal:
            return np.broadcast_to(1.0 - np.eye(3), (*each.shape[:-1], 3, 3))
        # from the middle of one label to the middle of the other, counted in labels given
        middle = each.cumsum(-1) - each / 2
        return (middle[..., :, None] - middle[..., None, :]) ** 2


def _corrected(agreed: Floats, expected: Floats) -> Floats:
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected < 1, (agreed - expected) / (1 - expected), np.nan)


def tie_discounted(one: int, other: int) -> float:
    """Points of two labels (Zhou et al. 2023, LIMA, arXiv 2305.11206, section 4.2): 1 for the same, a half where one of
    the annotators, and not both, said tie, else 0. Their mean is the tie-discounted accuracy."""
    return 1.0 if one == other else 0.5 if 0 in (one, other) else 0.0


def everyone(found: Ratings) -> dict[str, Interval | None]:
    """Fleiss' kappa and Krippendorff's alpha of all annotators together."""
    labels = [(unit[0], list(by.values())) for unit, by in found.items()]
    return {
        "fleiss": Fleiss("Fleiss 1971").measure(labels),
        "krippendorff": Krippendorff("Krippendorff 2011, nominal").measure(labels),
        "krippendorff_ordinal": Krippendorff("Krippendorff 2011, ordinal", ordinal=True).measure(labels),
    }


def between_people(found: Ratings) -> dict[tuple[str, str], dict[str, Interval | None]]:
    """Cohen's kappa and tie-discounted accuracy of every two annotators who judged the same."""
    people = sorted({name for by in found.values() for name in by})
    answer = {}
    for one, other in combinations(people, 2):
        both = [(unit[0], by[one], by[other]) for unit, by in found.items() if one in by and other in by]
        if both:
            answer[one, other] = {
                "cohen": Cohen("Cohen 1960").measure(((prompt, labels) for prompt, *labels in both), FEW),
                "tie_discounted": share((prompt, tie_discounted(*labels)) for prompt, *labels in both),
            }
    return answer


def between_groups(found: Ratings, group: dict[str, str]) -> dict[tuple[str, str], Interval | None]:
    """Tie-discounted accuracy within each group and between every two, as in crowd-crowd and crowd-model.

    Args:
        group: of each annotator.
    """
    names = sorted(set(group.values()))
    chosen = [(one, other) for place, one in enumerate(names) for other in names[place:]]
    answer = {both: share(_meetings(found, group, both)) for both in chosen}
    return {both: value for both, value in answer.items() if value is not None}


def with_the_others(found: Ratings, name: str) -> Interval | None:
    """Tie-discounted accuracy of one annotator with everyone else: how reliable they are."""
    return share(
        (unit[0], tie_discounted(by[name], label))
        for unit, by in found.items()
        if name in by
        for other, label in by.items()
        if other != name
    )


def _meetings(found: Ratings, group: dict[str, str], both: tuple[str, str]) -> Iterator[tuple[int, float]]:
    for unit, by in found.items():
        for one, other in combinations(by, 2):
            if tuple(sorted((group[one], group[other]))) == both:
                yield unit[0], tie_discounted(by[one], by[other])
