"""Runs that learn from compared answers, end to end on tiny models: judged, reloaded, evaluated afresh, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import encoder_folder
from tiny_folders import tiny_folder
from tiny_runs import metric, read, records, short_run

from tunesmith.config import Config, build_config
from tunesmith.core.errors import ConfigError, DataError, Stopped
from tunesmith.data.batch import to_batch
from tunesmith.models.policy import Policy
from tunesmith.run import run
from tunesmith.run.judging import Question, judge_models
from tunesmith.run.opening import open_model
from tunesmith.run.pair_exam import PairExam
from tunesmith.run.planning import plan_run
from tunesmith.run.prepare import prepare
from tunesmith.run.speaking import Speaker

NOUNS = ("film", "book", "song", "play", "show")
GOOD, BAD = ("lovely", "great", "fine"), ("awful", "dull", "poor")


def pairs(count: int = 30) -> list[dict[str, Any]]:
    """The good answer is chosen; lengths say nothing."""
    rows = []
    for number in range(count):
        answers = [
            f"it is {words[number % 3]}" + " very" * (number // side % 2) for side, words in ((3, GOOD), (6, BAD))
        ]
        rows.append({"prompt": f"the {NOUNS[number % 5]} was", "chosen": answers[0], "rejected": answers[1]})
    return rows


def config(folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    usual = {
        "objective": "reward",
        "train": {"steps": 20, "rows_per_step": 10, "lr": 0.02},
        "evaluate": {"metrics": ["accuracy", "loss"], "every": 10},
    }
    return short_run(folder, model, rows, **{**usual, **changes})


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory, writer: Path) -> Path:
    return run(config(tmp_path_factory.mktemp("reward"), writer, pairs()))


def test_a_tiny_decoder_learns_which_answers_are_better(rewarded: Path) -> None:
    """Beside chance and length. Kills: sides swapped anywhere between the file and the table."""
    assert metric(rewarded, "tuned", "accuracy") >= 95.0
    assert metric(rewarded, "constant score", "accuracy") == 50.0
    assert metric(rewarded, "longer answer", "accuracy") < 80.0
    assert metric(rewarded, "untuned", "accuracy") < 95.0
    last = records(rewarded)[-1]
    assert last["eval_accuracy"] == metric(rewarded, "tuned", "accuracy")
    assert last["eval_loss"] == pytest.approx(metric(rewarded, "tuned", "loss"), rel=1e-5)
    assert last["eval_margin"] > 0
    assert last["rows"] == 10
    sample = json.loads((rewarded / "samples.jsonl").read_text().splitlines()[0])
    assert (sample["prompt"], sample["references"]) == ("the film was", [sample["tuned"]])
    told = read(rewarded, "eval.json")["pairs"]
    assert sum(part["pairs"] for part in told["by_length"]) == 30 == sum(part["pairs"] for part in told["calibration"])
    page = (rewarded / "report.html").read_text()
    assert "Calibration" in page
    assert "how much longer" in page


def test_what_was_saved_scores_the_same_whatever_lies_beside(rewarded: Path) -> None:
    """In another process's stead: opened afresh, bit for bit. Kills: a head drawn again; a score at another token."""
    rows = str(rewarded.parent / "rows.jsonl")
    [model] = judge_models([str(rewarded)], Question(rows, ("accuracy", "loss"), precision="fp32"))["models"]
    assert model["metrics"]["loss"]["value"] == metric(rewarded, "tuned", "loss")
    opened = open_model(str(rewarded), precision="fp32")
    exam = PairExam(prepare(build_config(_raw(rewarded))).train, ("accuracy",))
    policy = Policy(opened.loaded, opened.route)
    with torch.no_grad():
        together = policy.scores(to_batch(exam.examples[:4]))
        alone = torch.cat([policy.scores(to_batch([part])) for row in exam.examples[:4] for part in row.documents()])
        last = policy.hidden(to_batch(exam.examples[0].documents()[:1]))[-1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weight = dict(opened.adapter.parameters)["predict.weight"]
    torch.testing.assert_close(weight[0] @ last, together[0, 0], rtol=1e-5, atol=1e-5)
    assert "predict.bias" not in opened.adapter.parameters


def _raw(folder: Path) -> dict[str, Any]:
    from tunesmith.core.yaml import read_yaml

    found: dict[str, Any] = read_yaml(folder / "config.yaml")
    return found


def test_a_reward_model_does_not_write_and_says_so(rewarded: Path) -> None:
    """Kills: an answer by a model that only scores."""
    with pytest.raises(ConfigError, match="a score for each answer; it writes no text") as caught:
        Speaker(str(rewarded))
    assert "--metrics accuracy" in caught.value.hint


@pytest.mark.slow
def test_a_tiny_encoder_learns_it_too(tmp_path: Path) -> None:
    """Kills: a template asked of an encoder; a pair of texts whose answer is not read."""
    done = run(
        config(
            tmp_path,
            encoder_folder(tmp_path / "model"),
            pairs(),
            method="full",
            train={"steps": 30, "rows_per_step": 15, "lr": 0.003},
        )
    )
    assert metric(done, "tuned", "accuracy") >= 90.0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "kto", "orpo"])
def test_a_tiny_decoder_learns_to_prefer(variant: str, writer: Path, tmp_path: Path) -> None:
    """Kills: a reference that moves along; a variant that learns the wrong side."""
    objective = {"kind": "dpo", "loss": variant}
    done = run(
        config(tmp_path, writer, pairs(), objective=objective, train={"steps": 20, "rows_per_step": 10, "lr": 0.01})
    )
    assert metric(done, "tuned", "accuracy") >= 90.0
    first, last = records(done)[0], records(done)[-1]
    if variant == "sigmoid":
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    if variant != "orpo":
        assert metric(done, "untuned", "accuracy") == 50.0
    assert last["eval_chosen_logp"] > last["eval_rejected_logp"]
    assert json.loads((done / "run.json").read_text())["status"] == "finished"
    assert _raw(done)["objective"]["loss"] == variant
    question = Question(str(tmp_path / "rows.jsonl"), ("accuracy", "loss"), precision="fp32", baselines=True)
    afresh, *others = judge_models([str(done)], question)["models"]
    assert afresh["metrics"]["loss"]["value"] == pytest.approx(metric(done, "tuned", "loss"), rel=1e-6)
    assert [other["name"] for other in others] == ["constant score", "longer answer"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reward", "dpo"])
def test_a_stopped_run_goes_on_bit_for_bit(
    objective: str, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: anything of a reference or a head that a checkpoint forgets."""
    train = {"steps": 8, "rows_per_step": 10, "lr": 0.02, "save_every": 2}
    changes: dict[str, Any] = {"objective": objective, "train": train, "evaluate": {"every": 3, "rows": 4}}
    whole = run(config(tmp_path, writer, pairs(), out=str(tmp_path / "whole"), **changes))
    broken = config(tmp_path, writer, pairs(), out=str(tmp_path / "broken"), **changes)
    measure, calls = PairExam.measure, []

    def interrupted(self: PairExam, policy: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, policy)

    monkeypatch.setattr(PairExam, "measure", interrupted)
    with pytest.raises(Stopped):
        run(broken)
    done = run(broken, resume=True)
    for file in (whole / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (done / "adapter" / file.name).read_bytes()
    assert [r["eval_loss"] for r in records(whole) if "eval_loss" in r] == [
        r["eval_loss"] for r in records(done) if "eval_loss" in r
    ]


def test_a_plan_counts_the_head_and_both_forwards(writer: Path, tmp_path: Path) -> None:
    """Kills: a reference that costs nothing; a head that is not counted; labels asked of rows that have none."""
    planned = {
        name: plan_run(prepare(config(tmp_path, writer, pairs(), objective=objective)), calibrated=False)
        for name, objective in {"reward": "reward", "dpo": "dpo", "orpo": {"kind": "dpo", "loss": "orpo"}}.items()
    }
    assert planned["reward"].parameters.trainable - planned["dpo"].parameters.trainable == 32
    both, one = planned["dpo"].flops, planned["orpo"].flops
    assert 1.25 * one < both < 1.5 * one, "a third of a frozen base's forward and backward, about"
    assert planned["dpo"].parameters == planned["orpo"].parameters


def test_settings_that_do_not_fit_are_told(writer: Path, tmp_path: Path) -> None:
    """Kills: a reference that training would have moved; a pair learnt from as two answers to copy."""
    for method in ("full", "lp_ft"):
        with pytest.raises(ConfigError, match=f"method {method} changes that model itself"):
            config(tmp_path, writer, pairs(), objective="dpo", method=method)
    assert config(tmp_path, writer, pairs(), objective={"kind": "dpo", "loss": "orpo"}, method="full")
    with pytest.raises(ConfigError, match="label_smoothing has no effect with loss ipo"):
        config(tmp_path, writer, pairs(), objective={"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1})
    with pytest.raises(ConfigError, match="unknown key 'betta'; keys here are kind beta loss label_smoothing"):
        config(tmp_path, writer, pairs(), objective={"kind": "dpo", "betta": 0.1})
    with pytest.raises(ConfigError, match="bleu: not of predictions"):
        config(tmp_path, writer, pairs(), objective="dpo", evaluate={"metrics": ["bleu"]})
    with pytest.raises(DataError, match="none to copy"):
        prepare(config(tmp_path, writer, pairs(), objective="sft", evaluate={}))
    with pytest.raises(DataError, match="no answers to compare"):
        prepare(config(tmp_path, writer, [{"prompt": "a", "completion": "b"}] * 3))
    with pytest.raises(ConfigError, match="dpo compares what a decoder would write"):
        prepare(config(tmp_path, encoder_folder(tmp_path / "bert"), pairs(), objective="dpo"))
