"""Curves and bars: round ticks, thinned and smoothed without bending, one scale."""

from __future__ import annotations

import re

import pytest

from tunesmith.evaluate import plots


def test_ticks_are_round_and_inside():
    assert plots.nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert plots.nice_ticks(1, 120, 5) == [25, 50, 75, 100]
    assert plots.nice_ticks(3, 3, 5) == [3]


def test_thinning_keeps_the_ends_and_the_mean():
    points = [(float(x), float(x % 7)) for x in range(1000)]
    few = plots.thin(points, 50)
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert len(few) <= 51
    assert sum(y for _, y in few) / len(few) == pytest.approx(3, abs=0.2)


def test_smoothing_leaves_a_straight_line_alone():
    """Kills: averaging backwards only, which lags behind."""
    line = [(float(x), 3.0 * x) for x in range(20)]
    assert [y for _, y in plots.smooth(line, 4)] == pytest.approx([y for _, y in line])
    assert plots.smooth([(float(x), 2.0) for x in range(9)], 4) == [(float(x), 2.0) for x in range(9)]


def test_bars_share_a_scale_and_start_at_zero_inside_the_picture():
    """Kills: starting bars at the smallest value; a scale that leaves zero outside."""
    bars = [plots.interval_bar(value, None, None, (5, 20)) for value in (5, 10, 20)]
    starts = {float(re.search(r' x="([\d.-]+)"', bar)[1]) for bar in bars}
    wide = [float(re.search(r' width="([\d.]+)"', bar)[1]) for bar in bars]
    assert len(starts) == 1
    assert min(starts) >= 0
    assert wide[1] == pytest.approx(2 * wide[0], rel=0.01)
    assert wide[2] == pytest.approx(4 * wide[0], rel=0.01)
