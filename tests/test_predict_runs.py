"""Runs that predict, end to end on tiny models: tuned, judged, resumed, evaluated afresh, exported, refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import encoder_folder, opinions, write_rows
from tiny_folders import tiny_folder
from tiny_runs import metric, read, records, short_run

from tunesmith.config import Config
from tunesmith.core.errors import ConfigError, DataError, Stopped
from tunesmith.run import run
from tunesmith.run.head_exam import HeadExam
from tunesmith.run.judging import Question, judge_models
from tunesmith.run.planning import plan_run
from tunesmith.run.prepare import prepare
from tunesmith.run.shipping import ship
from tunesmith.run.speaking import Speaker

TAGS = [
    {"tokens": ["the", noun, "is", word], "labels": ["DET", "NOUN", "VERB", "ADJ"]}
    for noun in ("film", "book", "song") for word in ("good", "bad", "dull", "fine")
]  # fmt: skip
METHODS_AND_RATES = {
    "lora": ({"rank": 4, "targets": ["q", "v", "up"]}, 0.02),
    "full": ({}, 0.003),
    "top_layers": ({"layers": 1}, 0.01),
    "linear_probe": ({}, 0.1),
}


def config(folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    usual = {
        "objective": "predict",
        "train": {"steps": 30, "rows_per_step": 20, "lr": 0.02},
        "evaluate": {"metrics": ["accuracy", "matthews", "f1", "loss"], "every": 15},
    }
    return short_run(folder, model, rows, **{**usual, **changes})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def learnt(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on opinions, whose rows lie beside it."""
    return run(config(tmp_path_factory.mktemp("learnt"), encoder, opinions()))


@pytest.mark.parametrize(
    "method", [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS_AND_RATES]
)
def test_a_tiny_encoder_learns_to_tell_opinions_apart(method: str, encoder: Path, tmp_path: Path) -> None:
    """Kills: a head that is not trained, not saved, or not the one that is judged."""
    settings, rate = METHODS_AND_RATES[method]
    train = {"steps": 40, "rows_per_step": 20, "lr": rate}
    done = run(config(tmp_path, encoder, opinions(), method={"kind": method, **settings}, train=train))
    assert metric(done, "tuned", "accuracy") >= 90.0
    assert metric(done, "constant answer", "accuracy") == 50.0
    assert metric(done, "constant answer", "matthews") == 0.0
    assert metric(done, "untuned", "accuracy") < 90.0
    sample = json.loads((done / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "the film is good"
    assert sample["references"] == ["good"] == [sample["tuned"]]
    last = records(done)[-1]
    assert last["eval_accuracy"] == metric(done, "tuned", "accuracy")
    assert last["eval_loss"] == pytest.approx(metric(done, "tuned", "loss"), rel=1e-5)
    afresh = judge_models([str(done)], Question(str(tmp_path / "rows.jsonl"), ("accuracy", "loss"), precision="fp32"))
    [model] = afresh["models"]
    assert model["metrics"]["loss"]["value"] == pytest.approx(metric(done, "tuned", "loss"), rel=1e-6)
    assert (done / "report.html").read_text().count("accuracy")


@pytest.mark.slow
def test_another_process_predicts_the_same(learnt: Path, tmp_path: Path) -> None:
    """Kills: anything of the head that only this process knows."""
    done, rows = learnt, learnt.with_name("rows.jsonl")
    words = [sys.executable, "-m", "tunesmith", "evaluate", str(done), "--data", str(rows)]
    words += ["--metrics", "accuracy,matthews,loss", "--precision", "fp32", "--json", "--out", str(tmp_path / "judged")]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    [model] = json.loads(told.stdout)["models"]
    assert model["metrics"]["loss"]["value"] == metric(done, "tuned", "loss")
    lines = zip((done / "samples.jsonl").open(), (tmp_path / "judged" / "samples.jsonl").open(), strict=True)
    assert all(json.loads(ours)["tuned"] == json.loads(theirs)[str(done)] for ours, theirs in lines)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_models_that_write_can_predict_as_well(family: str, tmp_path: Path) -> None:
    """Kills: pooling by encoders alone; an encoder-decoder without a start token."""
    model = tiny_folder(tmp_path / "model", family)
    done = run(config(tmp_path, model, opinions(), train={"steps": 60, "rows_per_step": 20, "lr": 0.02}))
    assert metric(done, "tuned", "accuracy") > 90.0


@pytest.mark.slow
def test_words_are_labelled(encoder: Path, tmp_path: Path) -> None:
    """Kills: labels of one word read for another."""
    done = run(config(tmp_path, encoder, TAGS, objective={"kind": "predict", "problem": "tokens"}))
    assert metric(done, "tuned", "accuracy") == 100.0
    assert metric(done, "constant answer", "accuracy") == 25.0
    sample = json.loads((done / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "the film is good"
    assert sample["tuned"] == "DET NOUN VERB ADJ"


@pytest.mark.slow
def test_scores_are_predicted(encoder: Path, tmp_path: Path) -> None:
    """Kills: labels of a regression read as classes; a bootstrap over ranks that fails."""
    rows = [{"text": row["text"], "label": 4.5 if row["label"] == "good" else 1} for row in opinions()]
    judged = {"metrics": ["pearson", "spearman", "loss"]}
    objective, train = {"kind": "predict", "problem": "regression"}, {"steps": 60, "rows_per_step": 20, "lr": 0.02}
    done = run(config(tmp_path, encoder, rows, objective=objective, evaluate=judged, train=train))
    assert metric(done, "tuned", "pearson") > 95.0
    assert metric(done, "tuned", "loss") < 0.3
    assert metric(done, "constant answer", "pearson") == 0.0


def test_a_plan_counts_the_head(encoder: Path, tmp_path: Path) -> None:
    """Kills: a head that the plan forgets; a trace that needs labels of real rows."""
    plain = prepare(config(tmp_path, encoder, opinions()))
    planned = plan_run(plain, calibrated=False)
    assert planned.exact_activations
    other = plan_run(
        prepare(config(tmp_path, encoder, [*opinions(), {"text": "the film", "label": "fine"}])), calibrated=False
    )
    assert other.parameters.trainable - planned.parameters.trainable == 32 + 1
    assert other.parameters.total - planned.parameters.total == 32 + 1
    words = config(tmp_path, encoder, TAGS, objective={"kind": "predict", "problem": "tokens"})
    assert plan_run(prepare(words), calibrated=False).memory.activations_bytes > 0


@pytest.mark.slow
def test_exports_keep_the_head(learnt: Path, tmp_path: Path) -> None:
    """Kills: an export that predicts something else, or nothing."""
    done = learnt
    whole, adapter = ship(str(done), "merged", str(tmp_path / "whole")), ship(str(done), "peft", str(tmp_path / "peft"))
    assert (whole / "predict.safetensors").read_bytes() == (adapter / "predict.safetensors").read_bytes()
    assert read(whole, "predict.json") == read(adapter, "adapter_config.json")["tunesmith_predict"]
    question = Question(str(learnt.with_name("rows.jsonl")), ("loss",), precision="fp32")
    for source in (whole, adapter):
        [model] = judge_models([str(source)], question)["models"]
        assert model["metrics"]["loss"]["value"] == pytest.approx(metric(done, "tuned", "loss"), rel=1e-4)
    with pytest.raises(ConfigError, match="GGUF holds models that write"):
        ship(str(done), "gguf", str(tmp_path / "x.gguf"))


@pytest.mark.slow
def test_what_predicts_does_not_write_and_says_so(learnt: Path, encoder: Path, tmp_path: Path) -> None:
    """Kills: a traceback from a template that an encoder does not have."""
    done = learnt
    with pytest.raises(ConfigError, match="labels for each text: bad, good; it writes no text") as caught:
        Speaker(str(done))
    assert "tunesmith evaluate" in caught.value.hint
    with pytest.raises(ConfigError, match="bert is an encoder"):
        Speaker(str(encoder))
    rows = str(learnt.with_name("rows.jsonl"))
    with pytest.raises(ConfigError, match="bleu: not of predictions"):
        judge_models([str(done)], Question(rows, ("bleu",)))
    with pytest.raises(ConfigError, match="no effect on a model that predicts"):
        judge_models([str(done)], Question(rows, ("accuracy",), shots=1))
    write_rows(tmp_path / "other.jsonl", [{"text": "the film is odd", "label": "odd"}])
    with pytest.raises(DataError, match="'odd' is not among those of the training data"):
        judge_models([str(done)], Question(str(tmp_path / "other.jsonl"), ("accuracy",)))


def test_settings_that_do_not_fit_are_told_together(encoder: Path, tmp_path: Path) -> None:
    """Kills: a metric of written answers that is asked of labels, found after training."""
    with pytest.raises(ConfigError) as caught:
        config(
            tmp_path, encoder, opinions(), evaluate={"metrics": ["bleu", "pearson"], "shots": 2},
            data={"train": "a", "eval": "b", "template": "plain"},
        )  # fmt: skip
    for part in ("bleu pearson: not of predictions", "evaluate.shots", "data.template"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="same label, 'good'"):
        prepare(config(tmp_path, encoder, [row for row in opinions() if row["label"] == "good"]))
    with pytest.raises(DataError, match="cannot learn from this row"):
        prepare(config(tmp_path, encoder, [{"prompt": "a", "completion": "b"}] * 3))


def test_an_untuned_head_is_the_one_that_training_begins_with(encoder: Path, tmp_path: Path) -> None:
    """The untuned row of the table is step 0 of the run. Kills: another draw of the head."""
    done = run(config(tmp_path, encoder, opinions(20), train={"steps": 1, "rows_per_step": 20, "lr": 0.02}))
    assert records(done)[0]["loss"] == pytest.approx(metric(done, "untuned", "loss"), rel=1e-5)


@pytest.mark.slow
def test_a_model_that_writes_learns_labels_as_words(tmp_path: Path) -> None:
    """The same rows with sft. Kills: labels that are no answers; metrics of labels for heads alone."""
    model = tiny_folder(tmp_path / "model")
    judged = {"metrics": ["accuracy", "matthews", "loss"], "generate": 8}
    train = {"steps": 80, "rows_per_step": 20, "lr": 0.01}
    done = run(config(tmp_path, model, opinions(), objective="sft", method="full", evaluate=judged, train=train))
    assert metric(done, "tuned", "accuracy") == 100.0
    assert metric(done, "tuned", "matthews") == pytest.approx(100.0)
    assert metric(done, "constant answer", "accuracy") == 50.0


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a head, or its moments, that a checkpoint forgets; another head at the second start."""
    train = {"steps": 12, "rows_per_step": 20, "lr": 0.02, "save_every": 4}
    whole = run(config(tmp_path, encoder, opinions(), train=train, out=str(tmp_path / "whole")))
    broken = config(tmp_path, encoder, opinions(), train=train, out=str(tmp_path / "broken"))
    measure, calls = HeadExam.measure, []

    def interrupted(self: HeadExam, policy: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, policy)

    every = broken.model_copy(update={"evaluate": broken.evaluate.model_copy(update={"every": 5})})
    monkeypatch.setattr(HeadExam, "measure", interrupted)
    with pytest.raises(Stopped):
        run(every)
    done = run(every, resume=True)
    for name in ("adapter_model.safetensors", "predict.safetensors"):
        assert (done / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
