"""Who survives a rung of successive halving: Optuna's pruner, asked so that the order of the settings says nothing."""

from __future__ import annotations

import math
import random
import sys

import pytest

from tunesmith.core.errors import ConfigError
from tunesmith.run.halving import survivors

Scores = dict[str, float | None]


def drawn(seed: int) -> Scores:
    """One to nine settings: scores with ties, and failures of every kind."""
    dice = random.Random(seed)
    level = dice.choice((2, 4, 1000))  # few levels are many ties
    names = [f"setting{at}" for at in range(dice.randint(1, 9))]
    dice.shuffle(names)
    failures = (None, math.nan, math.inf, -math.inf)
    return {
        name: dice.choice(failures) if dice.random() < 0.15 else dice.randrange(-level, level) / 7 for name in names
    }


def oracle(scores: Scores, greater_is_better: bool) -> list[str]:
    """Everybody as good as the last of the better half of those that have a score."""
    done = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    if not done:
        return []
    ranked = sorted(done.values(), reverse=greater_is_better)
    last = ranked[max(1, len(ranked) // 2) - 1]
    return [name for name, score in done.items() if (score >= last if greater_is_better else score <= last)]


@pytest.mark.parametrize("greater_is_better", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_better_half_goes_on_whatever_the_order(greater_is_better: bool) -> None:
    """Kills: the first asked always promoted; the worse half; a failure that goes on or counts as a rival."""
    for seed in range(300):
        scores = drawn(seed)
        found = survivors(scores, greater_is_better)
        assert found == oracle(scores, greater_is_better), scores
        turned = dict(reversed(scores.items()))
        assert set(survivors(turned, greater_is_better)) == set(found), scores


def test_nobody_goes_on_where_all_have_failed() -> None:
    assert survivors({"a": None, "b": math.nan}, True) == []
    assert survivors({}, False) == []


def test_one_that_has_no_rival_goes_on() -> None:
    assert survivors({"a": 0.0, "b": None}, True) == ["a"]


def test_optuna_says_nothing_and_keeps_its_own_level(capfd: pytest.CaptureFixture[str]) -> None:
    """Kills: a line for every study; a level that is changed for the program around."""
    import optuna

    before = optuna.logging.get_verbosity()
    survivors({"a": 1.0, "b": 2.0}, True)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[sweep\]'"):
        survivors({"a": 1.0}, True)
