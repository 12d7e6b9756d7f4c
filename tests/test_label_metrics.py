"""Metrics of labels: equal to the formulas they are named for, written again here, and additive over rows."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tunesmith.core.errors import DataError
from tunesmith.evaluate.bootstrap import interval
from tunesmith.evaluate.metrics import METRICS, OF_PROBLEM, PREDICTED

Rows = list[tuple[str, ...]]


def draw(
    labels: tuple[str, ...], rows: int = 300, right: float = 0.6, words: int = 1, seed: int = 0
) -> tuple[Rows, Rows]:
    """Predicted and true labels; the labels are not equally common."""
    random_ = random.Random(seed)
    weights = range(1, len(labels) + 1)

    def one() -> str:
        return random_.choices(labels, weights)[0]

    true = [tuple(one() for _ in range(random_.randint(1, words))) for _ in range(rows)]
    return [tuple(label if random_.random() < right else one() for label in row) for row in true], true


def value(name: str, predicted: Rows, true: Rows) -> float:
    metric = PREDICTED.load(name)()
    return float(metric.value(metric.from_labels(predicted, true).sum(0)))


def flat(rows: Rows) -> list[str]:
    return [label for row in rows for label in row]


def f1_of(label: str, predicted: list[str], true: list[str]) -> float:
    """Harmonic mean of precision and recall, by their definitions."""
    both = sum(a == b == label for a, b in zip(predicted, true, strict=True))
    precision = both / max(1, predicted.count(label))
    recall = both / max(1, true.count(label))
    return 0.0 if not both else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("labels", [("0", "1"), ("entailment", "not_entailment"), ("a", "b", "c", "d")])
@pytest.mark.parametrize("words", [1, 4])
def test_accuracy_and_f1_equal_their_definitions(labels: tuple[str, ...], words: int) -> None:
    """Kills: F1 of the first label; a mean over rows of different length; micro for macro."""
    rows = draw(labels, words=words)
    predicted, true = map(flat, rows)
    right = sum(map(str.__eq__, predicted, true))
    assert value("accuracy", *rows) == pytest.approx(100 * right / len(true), abs=1e-9)
    each = [f1_of(label, predicted, true) for label in labels]
    wanted = each[-1] if len(labels) == 2 else sum(each) / len(each)
    assert value("f1", *rows) == pytest.approx(100 * wanted, abs=1e-9)


@pytest.mark.parametrize("words", [1, 4])
def test_matthews_is_the_correlation_of_two_classes_and_of_many(words: int) -> None:
    """Against phi from the four cells, and against R_K as the correlation of one-hot columns.
    Kills: the sign; the marginals of one side used twice."""
    rows = draw(("0", "1"), words=words)
    predicted, true = map(flat, rows)
    cells = {pair: list(zip(predicted, true, strict=True)).count(pair) for pair in [(a, b) for a in "01" for b in "01"]}
    tp, tn, fp, fn = cells["1", "1"], cells["0", "0"], cells["1", "0"], cells["0", "1"]
    phi = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert value("matthews", *rows) == pytest.approx(100 * phi, abs=1e-9)
    rows = draw(("a", "b", "c"), words=words)
    x, y = (np.array([[label == name for name in "abc"] for label in flat(side)], float) for side in rows)
    x, y = x - x.mean(0), y - y.mean(0)
    assert value("matthews", *rows) == pytest.approx(100 * (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def scores(rows: int = 200, seed: int = 3) -> tuple[Rows, Rows]:
    """Numbers far from zero, many of them equal."""
    random_ = random.Random(seed)
    true = [10_000 + random_.randint(0, 12) for _ in range(rows)]
    return [(f"{number + random_.randint(-4, 4)}",) for number in true], [(str(number),) for number in true]


def test_pearson_and_spearman_equal_their_definitions() -> None:
    """Kills: ranks of ties in the order of the rows; squares of large numbers that cancel."""
    rows = scores()
    x, y = ([float(row[0]) for row in side] for side in rows)
    assert value("pearson", *rows) == pytest.approx(100 * np.corrcoef(x, y)[0, 1], abs=1e-9)

    def ranks(values: list[float]) -> list[float]:
        return [sum(other < one for other in values) + (values.count(one) + 1) / 2 for one in values]

    assert value("spearman", *rows) == pytest.approx(100 * np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-9)
    squared = [(str(float(row[0]) ** 3),) for row in rows[0]]
    assert value("spearman", squared, rows[1]) == pytest.approx(value("spearman", *rows))


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_a_constant_answer_correlates_with_nothing(name: str) -> None:
    """Kills: a NaN in eval.json, which JSON has no word for."""
    _, true = scores()
    assert value(name, [("1",)] * len(true), true) == 0.0
    assert value(name, true, true) == pytest.approx(100.0)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_intervals_come_from_sums_over_rows(name: str) -> None:
    """Kills: statistics that depend on their neighbours more than the signature says."""
    rows = scores() if name in OF_PROBLEM["regression"] else draw(("x", "y", "z"), words=3)
    metric = PREDICTED.load(name)()
    found = interval(metric, metric.from_labels(*rows))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(value(name, *rows))
    assert found.n == len(rows[0])
    if name in ("pearson", "matthews", "accuracy"):
        half = [side[:100] for side in rows]
        assert float(metric.value(metric.from_labels(*rows)[:100].sum(0))) == pytest.approx(value(name, *half))


def test_written_answers_count_as_labels_without_case() -> None:
    """Verbalised labels of a decoder. Kills: `matthews` for heads alone; the second reference used."""
    metric = METRICS.load("matthews")()
    answers, references = [" Positive", "negative\n", "no idea", "negative"], [["positive"], ["negative"]] * 2
    wanted = value("matthews", [("p",), ("n",), ("?",), ("n",)], [("p",), ("n",)] * 2)
    assert metric.score(answers, references).value == pytest.approx(wanted)
    assert METRICS.load("pearson")().score(["1.5", " 3"], [["1"], ["2"]]).value == pytest.approx(100)
    with pytest.raises(DataError, match="row 2: 'high' is no number"):
        METRICS.load("spearman")().score(["1", "high"], [["1"], ["2"]])


def test_every_problem_has_its_metrics() -> None:
    assert set().union(*OF_PROBLEM.values()) == set(PREDICTED.names())
    assert set(PREDICTED.names()) <= set(METRICS.names())
    assert all(PREDICTED.load(name)().signature for name in PREDICTED.names())
