"""A model that judges answers: what it is asked, what its words say, and what follows from both orders."""

from __future__ import annotations

import pytest

from tunesmith.compare.verdicts import both_orders, question, ranks, verdict


def test_a_model_that_prefers_places_prefers_nothing() -> None:
    """Kills: the swapped verdict taken as it is."""
    assert both_orders(1, 1) == 0
    assert both_orders(1, -1) == 1
    assert both_orders(-1, 1) == -1
    assert both_orders(0, 0) == 0
    assert both_orders(None, 1) is None


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("A", 1), ("B.", -1), ("**C**", 0), ("A good answer, but B", -1), ("[[A]]", 1), ("ABC", None), ("", None)],
)
def test_the_last_letter_alone_is_the_verdict(said: str, wanted: int | None) -> None:
    assert verdict(said) == wanted


def test_a_judge_is_asked_about_answers_that_hold_braces() -> None:
    """Kills: an answer that is read as a template."""
    [asked] = question([{"role": "user", "content": "{first}"}], "{second}", "{0} %s")
    assert "[Request]\n{first}" in asked["content"]
    assert "[Answer A]\n{second}" in asked["content"]
    assert "[Answer B]\n{0} %s" in asked["content"]


def test_a_ranking_follows_from_the_pairs() -> None:
    """D > C > A = B. Kills: ranks from losses, ties broken."""
    pairs = {(0, 1): 0, (0, 2): -1, (0, 3): -1, (1, 2): -1, (1, 3): -1, (2, 3): -1}
    assert ranks(4, pairs) == [3, 3, 2, 1]
