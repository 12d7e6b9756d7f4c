"""The order of the rows: every row as often as its weight says, and nothing but (seed, epoch, position) matters."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import DataError
from tunesmith.data.order import Mixture


def epoch_of(mixture: Mixture, epoch: int = 0) -> list[tuple[int, int]]:
    return [mixture.pick(epoch, position) for position in range(len(mixture))]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_row_exactly_once(sizes: list[int], seed: int, epoch: int) -> None:
    """Kills: drawing with replacement, an off-by-one in the ends of the sources."""
    if not sum(sizes):
        with pytest.raises(DataError):
            Mixture(sizes, seed=seed)
        return
    expected = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    assert sorted(epoch_of(Mixture(sizes, seed=seed), epoch)) == expected


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 30), weight=st.floats(0.05, 3.5), epoch=st.integers(0, 3))
def test_a_weight_is_how_often_an_epoch_sees_each_row(size: int, weight: float, epoch: int) -> None:
    """Kills: a fractional part that repeats rows while others are unseen."""
    seen = Counter(epoch_of(Mixture([size], [weight], seed=1), epoch))
    assert sum(seen.values()) == max(1, round(size * weight))
    counts = [seen[(0, row)] for row in range(size)]
    assert max(counts) - min(counts) <= 1


def test_quarters_of_four_epochs_are_the_whole_source() -> None:
    """Kills: the same quarter in every epoch."""
    mixture = Mixture([40, 7], [0.25, 1], seed=3)
    seen = Counter(row for epoch in range(4) for source, row in epoch_of(mixture, epoch) if source == 0)
    assert seen == Counter(range(40))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    """Kills: leaving the epoch or the seed out of the key; keeping state between picks."""
    mixture = Mixture([50, 30], seed=5)
    first = epoch_of(mixture)
    assert epoch_of(Mixture([50, 30], seed=5)) == first
    assert [mixture.pick(0, place) for place in reversed(range(80))] == first[::-1]
    assert epoch_of(mixture, 1) != first
    assert epoch_of(Mixture([50, 30], seed=6)) != first
    assert first != sorted(first)


def test_a_small_weight_on_a_small_source_still_counts() -> None:
    assert len(Mixture([3, 100], [0.1, 1.0])) == 101


def test_places_outside_the_epoch_are_refused() -> None:
    with pytest.raises(IndexError):
        Mixture([3]).pick(0, 3)
    with pytest.raises(ValueError, match="positive"):
        Mixture([3], [0.0])
