"""Intervals: they are those of the textbook, the same every time, and cover the truth as often as they say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tunesmith.core.errors import DataError
from tunesmith.evaluate import bootstrap
from tunesmith.evaluate.bootstrap import difference, interval
from tunesmith.evaluate.metrics.bleu import Bleu
from tunesmith.evaluate.metrics.losses import Perplexity
from tunesmith.evaluate.metrics.match import Accuracy
from tunesmith.evaluate.metrics.mteval import Nist


def answers(rows: int, right: int) -> np.ndarray:
    return Accuracy().statistics(["x"] * right + ["y"] * (rows - right), [["x"]] * rows)


def test_a_draw_is_a_resample_of_whole_rows():
    """Kills: draws without replacement; draws of another size than the data."""
    counts = np.concatenate(list(bootstrap._draws(7, 0, 500)))
    assert counts.shape == (500, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == np.round(counts)).all()
    assert counts.max() > 1
    assert counts.mean(0) == pytest.approx(np.ones(7), abs=0.15)


def test_the_interval_of_a_corpus_metric_is_that_of_scoring_every_resample():
    """Kills: row scores averaged where the metric is one of the whole corpus."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "with", "two", "dogs"]
    refs = [[" ".join(draw.choices(words, k=9))] for _ in range(12)]
    texts = [" ".join(word for word in ref[0].split() if draw.random() < 0.85) for ref in refs]
    metric = Bleu()
    found = interval(metric, metric.statistics(texts, refs), draws=40, seed=3)
    values = []
    for counts in np.concatenate(list(bootstrap._draws(12, 3, 40))).astype(int):
        rows = [row for row, times in enumerate(counts) for _ in range(times)]
        values.append(metric.score([texts[row] for row in rows], [refs[row] for row in rows]).value)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert found.value == metric.score(texts, refs).value
    assert (found.n, found.signature) == (12, metric.signature)


def test_an_interval_is_a_function_of_rows_and_seed():
    """Kills: the global random state; a seed that has no effect; an order of draws that depends on memory."""
    counts = answers(200, 90)
    one = interval(Accuracy(), counts, seed=1)
    np.random.seed(0)
    assert interval(Accuracy(), counts, seed=1) == one
    assert interval(Accuracy(), counts, seed=2) != one
    assert one.low < one.value < one.high


def test_memory_does_not_change_the_draws(monkeypatch):
    """Kills: another interval for data that is drawn in parts."""
    counts = answers(50, 20)
    one = interval(Accuracy(), counts)
    monkeypatch.setattr(bootstrap, "_CELLS", 333)
    assert interval(Accuracy(), counts) == one


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Kills: ends of the wrong level; half-widths of one draw instead of the mean."""
    random_rows = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        right = int(random_rows.binomial(120, 0.4))
        found = interval(Accuracy(), answers(120, right), draws=400, seed=trial)
        inside += found.low <= 40 <= found.high
    assert 0.91 <= inside / 300 <= 0.98


def test_intervals_narrow_with_the_root_of_the_rows():
    """Kills: an interval of rows instead of their mean."""
    widths = [found.high - found.low for found in (interval(Accuracy(), answers(n, n // 2)) for n in (100, 1600))]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)


def test_rows_that_do_not_vary_have_no_width():
    """Kills: noise added by the draws themselves."""
    found = interval(Accuracy(), answers(30, 30))
    assert (found.low, found.value, found.high) == (100, 100, 100)


def test_a_paired_difference_sees_what_two_intervals_cannot():
    """Kills: systems resampled apart."""
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 30, 200)
    ones = np.ones(200)
    ours = np.stack([50 + hard + 1 + draw.normal(0, 0.5, 200), ones], 1)
    theirs = np.stack([50 + hard, ones], 1)
    gap = difference(Accuracy(), ours, theirs)
    assert gap.excludes_zero
    assert gap.low == pytest.approx(1, abs=0.3)
    apart = [interval(Accuracy(), counts) for counts in (ours, theirs)]
    assert apart[0].low < apart[1].high
    back = difference(Accuracy(), theirs, ours)
    assert (back.value, back.low, back.high) == pytest.approx((-gap.value, -gap.high, -gap.low))
    same = difference(Accuracy(), ours, ours)
    assert (same.value, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)


def test_perplexity_is_resampled_by_row_and_weighed_by_token():
    """Kills: a mean of row perplexities."""
    metric = Perplexity()
    found = interval(metric, metric.from_losses([10.0, 4.0, 60.0], [10, 2, 20]))
    assert found.value == pytest.approx(np.exp(74 / 32))
    assert np.exp(1.0) <= found.low < found.value < found.high <= np.exp(3.0)


def test_nist_keeps_its_information_weights_while_rows_are_resampled():
    """Kills: weights taken from a resample, in which a row may be there twice."""
    metric = Nist()
    counts = metric.statistics(["a b", "c d"], [["a b"], ["c d"]])
    twice = metric.value(counts[[0, 0]].sum(0))
    assert twice == pytest.approx(metric.value(counts[:1].sum(0)))


def test_no_rows_and_unequal_rows_are_errors():
    """Kills: a percentile of nothing."""
    with pytest.raises(DataError, match="no rows"):
        interval(Accuracy(), answers(1, 1)[:0])
    with pytest.raises(DataError, match="the same rows"):
        difference(Accuracy(), answers(3, 1), answers(4, 1))
