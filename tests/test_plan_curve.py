"""What more data is worth: the curve through short runs, its intervals, and the runs themselves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from plan_models import saved_model

from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError
from tunesmith.plan.curve import Estimate, fit_curve
from tunesmith.run import curving
from tunesmith.run.curving import SHARES, Answer, answered, attempts, find_curve, show_curve
from tunesmith.run.folder import RunFolder
from tunesmith.run.prepare import prepare

TOKENS = [1e4, 2e4, 4e4, 8e4] * 2


@pytest.mark.parametrize(("floor", "amplitude", "exponent"), [(1.5, 40, 0.4), (0.8, 5, 0.15), (2.0, 3000, 0.9)])
def test_a_curve_without_noise_is_found_again(floor: float, amplitude: float, exponent: float):
    """In float64. Kills: fitting the logarithm of the loss; counting tokens in thousands."""
    found = fit_curve(TOKENS, [floor + amplitude * tokens**-exponent for tokens in TOKENS])
    assert (found.floor, found.amplitude, found.exponent) == pytest.approx((floor, amplitude, exponent), rel=1e-9)
    assert found.noise < 1e-12
    assert found.gain(8e4).value == pytest.approx(amplitude * (8e4**-exponent - 16e4**-exponent))


@pytest.mark.slow
def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    """95 of 100, less what a sample of 80 may stray. Kills: an interval of E with a held fixed."""
    draws, (floor, amplitude, exponent), count = np.random.default_rng(0), (1.5, 40, 0.4), 80
    held = dict.fromkeys(("floor", "exponent", "gain", "later"), 0)
    for _ in range(count):
        noisy = [floor + amplitude * tokens**-exponent + 0.01 * draws.normal() for tokens in TOKENS]
        found = fit_curve(TOKENS, noisy)
        said = {name: Estimate(**one) for name, one in found.as_dict().items() if isinstance(one, dict)}
        said |= {"gain": found.gain(8e4), "later": found.at(1e6)}
        truth = {"floor": floor, "exponent": exponent, "gain": amplitude * 8e4**-exponent * (1 - 2**-exponent)}
        truth["later"] = floor + amplitude * 1e6**-exponent
        for name in held:
            held[name] += said[name].low <= truth[name] <= said[name].high
    assert all(times / count >= 0.87 for times in held.values()), held
    assert max(held.values()) < count  # an interval that holds everything says nothing


def test_few_runs_are_no_curve():
    with pytest.raises(ConfigError, match="four runs of three amounts"):
        fit_curve([1, 1, 2, 2], [3, 3, 2, 2])


def runs(amplitude: float, wide: float) -> Answer:
    """Eight runs that stray by 0.002, and one with twice the trained numbers at `wide` below its twin."""
    found, strays = [], iter((1, -1, -1, 1) * 2)
    for share in SHARES:
        for seed in (0, 1):
            tokens = round(1e6 * share)
            loss = 2 + amplitude * tokens**-0.3 + 0.002 * next(strays)
            found.append({"share": share, "seed": seed, "wide": False, "tokens": tokens, "loss": loss})
    twin = next(run for run in found if (run["share"], run["seed"]) == (SHARES[-1], 0))
    return answered([*found, {**twin, "wide": True, "loss": twin["loss"] - wide}], 1e6)


@pytest.mark.parametrize(
    ("amplitude", "wide", "worth"), [(20.0, 0.0, "data"), (0.5, 0.2, "parameters"), (1.0, 0.004, "neither")]
)
def test_what_is_worth_more_is_said_where_the_runs_tell(amplitude: float, wide: float, worth: str):
    """Kills: comparing estimates without their intervals; the twin of another seed."""
    found = runs(amplitude, wide)
    assert found.worth == worth
    assert found.doubled is not None
    assert found.doubled.value == pytest.approx(wide)
    assert asdict(found.more_data) == found.as_dict()["largest_share"]["twice_the_data"]
    assert show_curve(found.as_dict())[-1].startswith(
        {"data": "more data", "parameters": "more trained"}.get(worth, "neither")
    )


def config(**changes):
    raw = {"model": "none", "data": {"train": "rows.jsonl", "eval": "held.jsonl"}, "out": "run"}
    return build_config({**raw, "method": {"kind": "lora", "rank": 4, "alpha": 8}, "train": {"steps": 9}, **changes})


def test_runs_are_on_seeded_shares_once_and_one_has_twice_the_rank_scaled_alike(tmp_path: Path):
    """Kills: a share of the steps instead of the rows; twice the rank at the same alpha, which halves the change."""
    found = list(attempts(config(), tmp_path))
    assert [one.share for one in found] == [0.01, 0.01, 0.02, 0.02, 0.04, 0.04, 0.08, 0.08, 0.08]
    for one in found:
        made = one.trial.config
        assert made.data.train[0].weight == one.share
        assert (made.train.epochs, made.train.steps, made.evaluate.metrics) == (1, None, ("loss",))
        assert (made.method.rank, made.method.alpha) == ((8, 16) if one.wide else (4, 8))
    assert len({one.trial.folder for one in found}) == 9


def test_a_curve_needs_rows_that_are_held_out(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"held-out rows"):
        find_curve(config(data={"train": "rows.jsonl"}), tmp_path)


def test_what_was_run_is_kept_and_the_answer_is_written(tmp_path: Path, monkeypatch):
    """The second time nothing runs. Kills: running again; a curve of the rows instead of the tokens."""
    rows = [{"prompt": f"say {number}", "completion": f"{number} {number}"} for number in range(820)]
    for name, part in (("train", rows[:800]), ("eval", rows[800:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")} | {"template": "plain"}
    folder = saved_model("llama", tmp_path / "model")
    wanted = config(model=str(folder), data=data, train={"steps": 1, "tokens_per_step": 256, "lr": 0.01})
    ran: list[str] = []

    def carried(trial, deadline, tick):
        """A run that reads its rows and learns nothing."""
        ran.append(trial.name)
        tokens = prepare(trial.config).totals.tokens
        facts = {"status": "finished", "tokens": tokens, "metrics": {"loss": {"value": 2 + tokens**-0.5}}}
        trial.folder.mkdir(parents=True)
        RunFolder(trial.folder).write_config(trial.config)
        (trial.folder / "trial.json").write_text(json.dumps(facts))
        return facts

    monkeypatch.setattr(curving, "carry_out", carried)
    monkeypatch.setattr(curving, "SHARES", (0.01, 0.02, 0.04))
    found = find_curve(wanted, tmp_path / "curve").as_dict()
    assert len(ran) == 7
    assert json.loads((tmp_path / "curve" / "curve.json").read_text()) == found
    tokens = {run["share"]: run["tokens"] for run in found["runs"]}
    assert tokens[0.04] == pytest.approx(4 * tokens[0.01], rel=0.1)
    assert find_curve(wanted, tmp_path / "curve").as_dict() == found
    assert len(ran) == 7
