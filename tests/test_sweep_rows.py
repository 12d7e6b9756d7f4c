"""From trials to rows: means with Student's interval, gains on the right side, honest gaps."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tunesmith.evaluate.plots import Dot, scatter
from tunesmith.evaluate.seeds import over_seeds, student
from tunesmith.evaluate.sweep_page import sweep_page
from tunesmith.evaluate.sweep_rows import base_row, rank_table, sort_rows, sweep_row
from tunesmith.evaluate.sweep_table import headline, interval, notes, sweep_markdown

BASE = {"models": [{"name": "untuned", "metrics": {"accuracy": {"value": 50.0}, "loss": {"value": 2.0}}}],
        "parameters": 1000, "general_loss": 3.0}  # fmt: skip


def setting(name: str = "lora-q-r2", why: str = "budget", **method: Any) -> dict[str, Any]:
    method = {"targets": ["q"], "rank": 2} | method
    return {"name": name, "kind": "lora", "why": why, "method": method, "parameters": 100, "lr": 0.1, "note": ""}


def trial(seed: int, accuracy: float, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    metrics = {"accuracy": {"value": accuracy}, "loss": {"value": loss}}
    return {"seed": seed, "status": "finished", "metrics": metrics, "cpu_seconds": 20.0, "general_loss": 3.5} | more


def row(*trials: dict[str, Any], metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    return sweep_row(setting(**more), trials, base_row(BASE, metric), metric)


def test_the_interval_over_seeds_holds_the_mean_19_times_of_20() -> None:
    """Kills: a normal quantile for three seeds (88 of 100); the spread without the root of their number."""
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        found = over_seeds([draw.gauss(5.0, 2.0) for _ in range(3)])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 5.0 <= found.high
    assert 0.935 < held / 2000 < 0.965


def test_students_quantiles_fall_to_the_normal_one() -> None:
    points = [student(freedom) for freedom in range(1, 200)]
    assert points == sorted(points, reverse=True)
    assert math.isclose(points[-1], 1.96, abs_tol=0.02)


def test_one_seed_has_no_interval() -> None:
    found = over_seeds([4.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (4.0, None, None)
    assert over_seeds([]) is None


def test_gains_cost_and_forgetting_are_against_the_base() -> None:
    """Kills: a gain with the wrong sign for losses; a cost of a method that gained nothing."""
    found = row(trial(0, 60.0), trial(1, 70.0))
    assert found["gain"] == 15.0
    assert found["cpu_seconds_per_point"] == 20 / 15
    assert found["forgetting"] == 0.5
    assert found["share"] == 0.1
    worse = row(trial(0, 40.0))
    assert (worse["gain"], worse["cpu_seconds_per_point"]) == (-10.0, None)
    lower = row(trial(0, 0.0, loss=1.5), metric="loss")
    assert lower["gain"] == 0.5


def test_only_finished_trials_make_the_mean_and_failed_ones_are_named() -> None:
    """Kills: a failure that counts as a score of zero or goes unsaid."""
    found = row(
        trial(0, 60.0), {"seed": 1, "status": "failed", "error": "step 3: NaN"}, {"seed": 2, "status": "waiting"}
    )
    assert (found["score"]["values"], found["finished"], found["trials"]) == ((60.0,), 1, 3)
    assert found["failures"] == [{"seed": 1, "error": "step 3: NaN"}]
    nothing = row({"seed": 0, "status": "failed", "error": "x"})
    assert nothing["score"] is None
    assert nothing["gain"] is None


def test_the_best_comes_first_for_scores_and_for_losses() -> None:
    rows = [row(trial(0, 60.0, 0.5), name="a"), row(trial(0, 70.0, 0.7), name="b"), row(name="c")]
    assert [one["name"] for one in sort_rows(rows, "accuracy")] == ["b", "a", "c"]
    rows = [row(trial(0, 60.0, 0.5), name="a", metric="loss"), row(trial(0, 70.0, 0.7), name="b", metric="loss")]
    assert [one["name"] for one in sort_rows(rows, "loss")] == ["a", "b"]


def test_the_score_of_the_base_is_that_of_who_can_answer() -> None:
    """An encoder has no head before training: a constant answer is what there is to gain over."""
    models = [
        {"name": "untuned", "metrics": {"accuracy": {"value": 44.0}}},
        {"name": "constant answer", "metrics": {"accuracy": {"value": 51.0}}},
    ]
    facts = {"models": models, "parameters": 5}
    assert base_row(facts, "accuracy")["score"] == 44.0
    assert base_row(facts, "accuracy", ("constant answer",))["score"] == 51.0
    assert base_row({"models": [], "parameters": 5}, "accuracy")["score"] is None


def test_the_table_of_ranks_has_plain_lora_by_weight_types() -> None:
    rows = [row(trial(0, 60.0 + rank), name=f"r{rank}", rank=rank) for rank in (8, 2)]
    rows.append(row(trial(0, 1.0), name="dora", rank=4, dora=True))
    [found] = rank_table(rows, "accuracy")
    assert (found["targets"], list(found["ranks"])) == ("q", [2, 8])


def shown(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "model": "m", "budget": 100, "metric": "accuracy", "partial": False, "finished": 2, "trials": 2, "steps": 4,
        "rows_per_step": 4.0, "head_parameters": 0, "general": "text.txt", "base": base_row(BASE, "accuracy"),
        "rows": rows, "rank_tables": [], "left_out": {}, "data": {"train": "t", "eval": "e"},
        "machine": {"processor": "p", "cores": 2, "memory_bytes": 10**9}, "versions": {"torch": "2"},
    } | more  # fmt: skip


def test_a_partial_table_says_so() -> None:
    """Kills: a table of the first seed that looks like the result."""
    whole = shown([row(trial(0, 60.0))])
    assert "PARTIAL" not in headline(whole)
    part = whole | {"partial": True, "trials": 24}
    assert "PARTIAL: 2 of 24 trials" in headline(part)
    for text in (sweep_markdown(part), sweep_page(part)):
        assert "PARTIAL: 2 of 24 trials" in text


def test_notes_tell_what_failed_and_what_was_left_out() -> None:
    found = shown([row({"seed": 1, "status": "failed", "error": "step 3: NaN"})], left_out={"prompt": "too small"})
    text = "\n".join(notes(found))
    assert "lora-q-r2, seed 1: failed, step 3: NaN" in text
    assert "prompt: left out, too small" in text


def test_the_page_needs_nothing_else_and_escapes_what_is_not_its_own() -> None:
    """Kills: a name of a file that becomes markup; a style or script from elsewhere."""
    found = shown([row(trial(0, 60.0), name="<script>x</script>")], left_out={"<b>": "<i>"})
    page = sweep_page(found)
    assert "<script" not in page
    assert "<b>:" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<svg" in page


def test_a_scatter_has_a_mark_and_an_interval_for_every_row() -> None:
    dots = [Dot("a", 1e3, 60.0, 55.0, 65.0), Dot("b", 2e6, 70.0, kind="second")]
    found = scatter("score", dots, lambda y: f"{y:.0f}", 50.0)
    assert found.count("<circle") == 4
    assert found.count('class="whisker"') == 1
    assert found.count('class="guide"') == 1
    assert scatter("score", [], str) == ""


@pytest.mark.parametrize(("score", "text"), [
    ({"mean": 61.25, "low": 60.0, "high": 62.5}, "61.2 (60.0 to 62.5)"),
    ({"mean": 1.2345, "low": None, "high": None}, "1.234"),
])  # fmt: skip
def test_a_score_is_written_with_its_interval(score: dict[str, Any], text: str) -> None:
    assert interval(score) == text
