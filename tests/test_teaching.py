"""Runs of distillation on tiny models: teachers on the same base and on another, kept, on own answers, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import tiny_folder

from tunesmith.config import Config, build_config
from tunesmith.core.errors import ConfigError, DataError
from tunesmith.data.encode import Example
from tunesmith.models.policy import Policy
from tunesmith.run import run
from tunesmith.run.kept_teaching import KeptTeaching
from tunesmith.run.opening import open_model
from tunesmith.run.own_answers import OwnAnswers
from tunesmith.run.placing import pieces_of_run
from tunesmith.run.planning import plan_run
from tunesmith.run.prepare import prepare
from tunesmith.run.sizing import largest_model
from tunesmith.run.teaching import Teaching
from tunesmith.train import trainer

ASIDE = ("_seconds", "_per_second", "_bytes")
TRAIN = {"steps": 6, "rows_per_step": 2, "micro_batch_rows": 1, "lr": 0.02, "save_every": 2}


class Killed(BaseException):
    """What nobody catches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with one vocabulary, one with another, rows, and a run on the first that teaches."""
    found = tmp_path_factory.mktemp("teaching")
    tiny_folder(found / "model")
    tiny_folder(found / "deeper", seed=5, num_hidden_layers=3, vocab_size=408)
    rows = [{"prompt": f"name {word}", "completion": f"{word} it is"} for word in ("red", "green", "blue", "one")]
    (found / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config(found, "sft", "teacher", method={"kind": "lora", "rank": 4, "targets": ["q", "v", "down"]}))
    return found


def config(folder: Path, objective: Any, out: str, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl")},
        "method": {"kind": "lora", "rank": 2, "targets": ["q", "v"]},
        "objective": objective,
        "train": TRAIN,
        "precision": {"compute": "fp32"},
        "log": [],
        "out": str(folder / out),
    }
    return build_config({**raw, **changes})


def distil(
    folder: Path, out: str, teacher: str = "teacher", method: Any = None, layout: Any = None, **settings: Any
) -> Config:
    objective = {"kind": "distill", "teacher": str(folder / teacher), **settings}
    judged = {"evaluate": {"metrics": ["divergence", "loss"], "every": 3}}
    more = {key: value for key, value in {"method": method, "layout": layout}.items() if value}
    return config(folder, objective, out, **judged, **more)


def records(done: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]


def judged(done: Path) -> dict[str, float]:
    found = json.loads((done / "eval.json").read_text())["models"]
    return {model["name"].split()[0]: model["metrics"]["divergence"]["value"] for model in found if model["metrics"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "method", "settings"),
    [
        ("teacher", None, {"divergence": "reverse", "temperature": 2.0, "top_k": 8}),
        ("deeper", "full", {"hard": 0.1}),
        ("teacher", None, {"on_policy": 0.5, "max_new_tokens": 5, "divergence": "jsd"}),
    ],
    ids=["kept", "second", "own"],
)
def test_a_student_comes_closer_to_its_teacher(
    teacher: str, method: Any, settings: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On held-out rows. Kills: a teacher that is the student, a loss with the wrong sign; a distance not measured."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    wanted = distil(folder, "-".join(["closer", teacher, *settings]), teacher, method, **settings)
    train = wanted.train.model_copy(update={"steps": 20})
    done = run(wanted.model_copy(update={"train": train}))
    before, after = judged(done)["untuned"], judged(done)["tuned"]
    assert 0 < after < 0.8 * before
    told = records(done)
    assert told[2]["eval_divergence"] > told[-1]["eval_divergence"] == pytest.approx(after)
    assert told[0]["divergence"] > 0
    if "on_policy" in settings:
        assert {record["own_share"] for record in told} == {0.0, 0.5, 1.0}


def test_a_teacher_on_the_same_base_is_a_route_and_stays_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a second copy of the base; a teacher that trains; the base taken for the teacher."""
    prepared = prepare(distil(folder, "beside"))
    loaded = open_model(str(folder / "model"), precision="fp32").loaded
    teaching = Teaching(prepared, loaded, "fp32")
    adapter = prepared.config.method.attach(loaded, seed=0)
    policy = Policy(loaded, adapter.route)
    assert teaching.adapter is not None
    for parameter in teaching.adapter.parameters.values():
        parameter.requires_grad_(True)  # as methods do that make copies
    teaching.stand_by(policy)
    assert policy.teacher is not None
    assert policy.teacher.model is loaded.model
    trains = {id(parameter) for parameter in adapter.parameters.values()}
    assert trains == {id(parameter) for parameter in loaded.model.parameters() if parameter.requires_grad}
    row = next(
        found for place in prepared.train.places() if isinstance(found := prepared.train.example(*place), Example)
    )
    batch = teaching.collate([row])
    alone = open_model(str(folder / "teacher"), precision="fp32")
    wanted = Policy(alone.loaded, alone.route).token_losses(batch)
    torch.testing.assert_close(policy.teacher.token_losses(batch), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(policy.token_losses(batch), wanted, atol=1e-4)


def test_what_is_kept_is_what_the_teacher_says_and_is_asked_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a key without the teacher, the temperature or the row; a damaged row that is believed."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    prepared = prepare(distil(folder, "kept", "deeper", top_k=5, temperature=2.0))
    loaded = open_model(str(folder / "model"), precision="fp32").loaded
    teaching = Teaching(prepared, loaded, "fp32")
    assert teaching.teacher is None
    assert teaching.kept is not None
    rows = [one for place in prepared.train.places() if isinstance(one := prepared.train.example(*place), Example)]
    batch = teaching.collate(rows)
    deeper = open_model(str(folder / "deeper"), precision="fp32")
    teacher = Policy(deeper.loaded)
    with torch.no_grad():
        wanted = (teacher.logits(batch, batch.sources) / 2.0).log_softmax(-1)
    assert batch.likeliest is not None
    found = wanted.gather(-1, batch.likeliest.places.long())
    torch.testing.assert_close(batch.likeliest.logprobs[:, :5], found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted.topk(5).values, rtol=1e-5, atol=1e-5)
    asked = []
    monkeypatch.setattr("tunesmith.run.teaching.ask", lambda *some: asked.append(some))
    Teaching(prepared, loaded, "fp32")
    assert asked == []
    with teaching.kept.database as database:
        database.execute("UPDATE said SET body = zeroblob(length(body))")
    assert teaching.kept.read(rows[0]) is None
    with pytest.raises(DataError, match="what the teacher said of"):
        teaching.collate(rows)
    paths = {KeptTeaching({"temperature": value}, count).path for value, count in ((1.0, 5), (2.0, 5), (2.0, 6))}
    assert len(paths) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: draws that depend on what was drawn before; answers of weights that have moved."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))

    def lasting(done: Path) -> Any:
        kept = [{key: one for key, one in record.items() if not key.endswith(ASIDE)} for record in records(done)]
        return kept, (done / "adapter" / "adapter_model.safetensors").read_bytes()

    settings: dict[str, Any] = {"on_policy": 0.5, "max_new_tokens": 5}
    whole = lasting(run(distil(folder, "whole", **settings)))
    wanted, seen = distil(folder, "broken", **settings), trainer._Run._step

    def broken(self: Any, step: Any) -> Any:
        if self.state.step == 3:
            raise Killed
        return seen(self, step)

    monkeypatch.setattr(trainer._Run, "_step", broken)
    with pytest.raises(Killed):
        run(wanted)
    monkeypatch.setattr(trainer._Run, "_step", seen)
    assert lasting(run(wanted, resume=True)) == whole


def test_the_student_answers_its_share_of_the_rows_and_learns_what_it_wrote(folder: Path) -> None:
    """Kills: a share of the steps or of the tokens; a prompt that is learnt; an answer without its end token."""
    from tunesmith.data.pack import Cursor

    prepared = prepare(distil(folder, "own", on_policy=0.25, max_new_tokens=5))
    loaded = open_model(str(folder / "model"), precision="fp32").loaded
    own = OwnAnswers(prepared, loaded, Policy(loaded))
    shares = [own._is_own(Cursor(epoch, place), row) for epoch in range(40) for place in range(5) for row in range(4)]
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.05)
    step = next(iter(own.stream(Cursor())))
    prompts = [prompt for rows in step.micro_batches for prompt in rows]
    for one, prompt in zip(own._written(prompts, step.place), prompts, strict=True):
        assert one.ids[: len(prompt.ids)] == prompt.ids
        assert one.supervised == [False] * len(prompt.ids) + [True] * (len(one.ids) - len(prompt.ids))
        assert 0 < one.answer_tokens <= 5
        ended = one.ids[-1] in prepared.train.template.stop_ids
        assert ended or one.answer_tokens == 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher": "words"}, "another vocabulary"),
        ({"teacher": "nowhere"}, "objective.teacher: there is no model"),
        ({"beta": 0.3}, "beta has no effect with divergence forward"),
        ({"top_k": 4, "on_policy": 0.5}, "on_policy makes new ones"),
        ({"max_new_tokens": 9}, "the student writes nothing"),
        ({"layout": {"data": 2}}, "distill runs in one process"),
    ],
)
def test_a_teacher_or_setting_that_cannot_be_is_refused(
    changes: dict[str, Any], told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are loaded. Kills: distributions over other tokens that are compared."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    if changes.get("teacher") == "words":
        tiny_folder(folder / "words", tokenizer={"vocab_size": 320})
    with pytest.raises(Exception, match=told):
        prepare(distil(folder, "refused", **changes))


def test_what_is_planned_from_a_config_alone_has_no_teacher(folder: Path) -> None:
    """Kills: a cluster that is told to hold the student only."""
    for plan in (lambda config: largest_model(config, 10**9), pieces_of_run):
        with pytest.raises(ConfigError, match="a teacher is not placed"):
            plan(distil(folder, "refused"))


@pytest.mark.slow
def test_a_plan_counts_a_teacher_that_is_a_second_model(folder: Path) -> None:
    """Kills: a plan without the teacher's weights, or with those of one that is a route."""
    plans = {name: plan_run(prepare(distil(folder, "p", name)), calibrated=False) for name in ("teacher", "deeper")}
    more = plans["deeper"].memory.weights_bytes - plans["teacher"].memory.weights_bytes
    deeper = open_model(str(folder / "deeper"), precision="fp32").loaded.model
    assert more == pytest.approx(sum(one.numel() * 4 for one in deeper.parameters()), rel=0.02)
    assert plans["deeper"].parameters.trainable == plans["teacher"].parameters.trainable


def test_divergence_is_measured_with_a_teacher_alone(folder: Path) -> None:
    """Kills: a metric that crashes, or is left out in silence, where there is no teacher."""
    from tunesmith.run.judging import Question, judge_models

    with pytest.raises(ConfigError, match="divergence is from a teacher"):
        config(folder, "sft", "sft", evaluate={"metrics": ["divergence"]})
    with pytest.raises(ConfigError, match="divergence is from a teacher"):
        judge_models([str(folder / "model")], Question(str(folder / "rows.jsonl"), ("divergence",)))
