"""The learning rate is a closed form of the step."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from tunesmith.train.schedule import learning_rate
from tunesmith.train.section import StopSection, TrainSection


def rates(total: int, **settings: object) -> list[float]:
    section = TrainSection.model_validate({"steps": total, **settings})
    return [learning_rate(section, step, total) for step in range(1, total + 1)]


def test_the_warm_up_rises_evenly_to_the_full_rate():
    """Kills: counting steps from 0 (a first update with rate 0)."""
    assert rates(10, lr=1.0, warmup=0.4, schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("linear", lambda f: 1 - f),
        ("cosine", lambda f: (1 + math.cos(math.pi * f)) / 2),
        ("constant", lambda f: 1.0),
    ],
)
def test_what_follows_the_warm_up_is_the_formula(schedule, shape):
    """Kills: progress measured over all steps instead of those after the warm-up."""
    got = rates(50, lr=3e-4, warmup=0.1, schedule=schedule)
    assert got[5:] == pytest.approx([3e-4 * shape((n - 6) / 45) for n in range(6, 51)], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_every_update_has_a_rate_above_zero_and_at_most_the_full_one(schedule, warmup, total):
    """Kills: a decay that reaches 0 at the last update; a division by zero when all steps warm up."""
    got = rates(total, lr=1e-3, warmup=warmup, schedule=schedule)
    assert all(0 < rate <= 1e-3 for rate in got)
    assert max(got) == 1e-3
    peak = got.index(1e-3)
    assert got[: peak + 1] == sorted(got[: peak + 1])
    assert got[peak:] == sorted(got[peak:], reverse=True)


def test_sizes_default_to_tokens_and_one_number_is_enough():
    section = TrainSection(steps=100)
    assert (section.tokens_per_step, section.micro_batch_tokens, section.rows_per_step) == (4096, 1024, None)
    assert TrainSection(steps=1, tokens_per_step=512).micro_batch_tokens == 512
    assert TrainSection(epochs=1, rows_per_step=3).micro_batch_rows == 3


def test_what_was_written_out_reads_back_the_same():
    for section in (TrainSection(steps=5), TrainSection(epochs=2, rows_per_step=8, stop=StopSection(metric="loss"))):
        assert TrainSection.model_validate(section.model_dump(mode="json")) == section


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "neither is given"),
        ({"steps": 1, "epochs": 1}, "both are given"),
        ({"steps": 1, "rows_per_step": 2, "tokens_per_step": 5}, "either tokens"),
        ({"steps": 1, "rows_per_step": 2, "micro_batch_tokens": 5}, "either tokens"),
        ({"steps": 1, "micro_batch_rows": 2}, "needs rows_per_step"),
        ({"steps": 1, "micro_batch_tokens": 9000}, "more than tokens_per_step"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": 1.5}, "integer"),
        ({"steps": True}, "integer"),
        ({"steps": 1, "lr": -1.0}, "greater than or equal to 0"),
        ({"steps": 1, "lr": "1e-4"}, "number"),
        ({"steps": 1, "lr": math.nan}, "finite"),
        ({"steps": 1, "warmup": 3}, "less than or equal to 1"),
        ({"steps": 1, "clip": -1}, "greater than or equal to 0"),
        ({"steps": 1, "stop": {"metric": "loss", "patience": 0}}, "greater than or equal to 1"),
        ({"steps": 1, "learning_rate": 1e-4}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        TrainSection.model_validate(settings)
