"""Runs over a model's own completions, on tiny models: identities at the start, resumption, learning, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import tiny_folder
from tiny_runs import records

from tunesmith.config import Config, build_config
from tunesmith.core.errors import CheckpointError, ConfigError
from tunesmith.data.pack import Cursor
from tunesmith.objectives.ppo import PPO, gae
from tunesmith.objectives.sampled import Written
from tunesmith.run import rollouts as module
from tunesmith.run import run
from tunesmith.run.kept_rollouts import Kept
from tunesmith.run.opening import open_model
from tunesmith.run.prepare import prepare
from tunesmith.run.rollouts import Rollouts
from tunesmith.train import trainer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "group": 4, "kl": 0.1, "iterations": 2},
    "ppo": {"kind": "ppo", "epochs": 2, "minibatches": 2, "kl_target": 0.01},
}
ASIDE = ("_seconds", "_per_second", "_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("policy"))


def filled(found: Path) -> Path:
    """A folder with a model, prompts and a reward."""
    tiny_folder(found / "model")
    rows = [{"prompt": f"name {word}", "answer": word} for word in ("red", "green", "blue", "one", "two", "three")]
    (found / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found / "own.py").write_text(
        "def letters(prompt, completion, row):\n    return sum(c in 'aeiou' for c in completion) / 8\n"
    )
    return found


def config(folder: Path, objective: dict[str, Any], out: str, **changes: Any) -> Config:
    own = {"reward": f"{folder}/own.py:letters", "max_new_tokens": 6}
    raw: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "rows.jsonl")},
        "method": {"kind": "lora", "rank": 4, "targets": ["q", "v", "up"]},
        "objective": objective if objective["kind"] == "sft" else {**own, **objective},
        "train": {"steps": 6, "rows_per_step": 2, "micro_batch_rows": 1, "lr": 0.02, "save_every": 3},
        "precision": {"compute": "fp32"},
        "log": [],
        "out": str(folder / out),
    }
    return build_config({**raw, **changes})


def lasting(done: Path) -> dict[str, Any]:
    kept = [{key: value for key, value in record.items() if not key.endswith(ASIDE)} for record in records(done)]
    files = {path.name: path.read_bytes() for path in (done / "adapter").glob("*.safetensors")}
    newest = max((done / "checkpoints").glob("step-??????"))
    files |= {f"last {path.name}": path.read_bytes() for path in newest.glob("*.safetensors")}
    return {"metrics": kept, "rollouts": (done / "rollouts.jsonl").read_bytes(), **files}


def started(folder: Path, objective: dict[str, Any], out: str, **changes: Any) -> tuple[Rollouts, Any]:
    """The rollouts of a fresh run, and its policy."""
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import BASE

    prepared = prepare(config(folder, objective, out, **changes))
    opened = open_model(str(folder / "model"), precision="fp32")
    adapter = prepared.config.method.attach(opened.loaded, seed=0)
    policy = Policy(opened.loaded, adapter.route)
    (folder / out).mkdir(exist_ok=True)
    return Rollouts(prepared, opened.loaded, policy, BASE, folder / out), policy


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_first_ratio_is_one_and_kl_zero_to_the_last_bit(kind: str, folder: Path) -> None:
    """In every minibatch while the policy stays. Kills: log-probabilities of another path, batch, or temperature."""
    rollouts, policy = started(folder, {**OBJECTIVES[kind], "temperature": 0.8}, f"first-{kind}")
    for number, step in zip(range(1, 5), rollouts.stream(Cursor()), strict=False):
        found, _ = rollouts(step, number)
        for rows in found.micro_batches:
            batch = rollouts.collate(rows)
            logprobs = -policy.at(0.8).token_losses(batch)
            assert torch.equal(logprobs.detach(), batch.actions.old)
            assert torch.equal(batch.actions.old, batch.actions.reference)
            assert batch.actions.advantages.shape == batch.targets.shape
            loss = rollouts.objective.loss(policy, batch)
            assert loss.facts["kl"] == 0
            assert loss.facts["clip_share"] == 0


def test_the_end_token_is_an_action_and_prompts_are_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: an end that is never learnt; a prompt that is."""
    rollouts, _ = started(folder, {"kind": "grpo", "group": 2, "max_new_tokens": 3}, "ends")
    step = next(iter(rollouts.stream(Cursor())))
    prompts = [prompt for rows in step.micro_batches for prompt in rows]
    stop = next(iter(rollouts.prepared.train.template.stop_ids))
    answers = [[5, stop], [5, 6, 7], [stop], [8, 9, stop]]

    def generate(*args: Any, **settings: Any) -> list[Any]:
        from tunesmith.models.generate import Completion

        ended = [ids[:-1] if ids[-1] == stop else None for ids in answers]
        pairs = zip(answers, ended, strict=True)
        return [Completion(ids, False) if end is None else Completion(end, True, stop) for ids, end in pairs]

    monkeypatch.setattr(module, "generate", generate)
    found, facts = rollouts(step, 1)
    made = sorted((one for rows in found.micro_batches for one in rows), key=lambda one: one.number)
    asked = [prompts[0], prompts[0], prompts[1], prompts[1]]
    for one, prompt, answer in zip(made, asked, answers, strict=True):
        assert one.ids == prompt.ids + answer
        assert one.example.supervised == [False] * len(prompt.ids) + [True] * len(answer)
        assert len(one.advantages) == len(answer)
    assert facts["completion_tokens"] == 9 / 4
    assert facts["stopped"] == 3 / 4


class Crash(BaseException):
    """What a kill is to files: nothing is written any more."""


def crashing(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, at: int) -> None:
    real, calls = getattr(where, name), []

    def called(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise Crash
        return real(*args, **settings)

    monkeypatch.setattr(where, name, called)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "where", "at"), [("grpo", "generate", 3), ("ppo", "update", 6)])
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(
    kind: str, where: str, at: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is in the middle of a rollout. Kills: a rollout of weights that have moved; another seed."""
    whole = lasting(run(config(folder, OBJECTIVES[kind], f"whole-{kind}")))
    asked = config(folder, OBJECTIVES[kind], f"broken-{kind}")
    with monkeypatch.context() as patch:
        crashing(patch, module if where == "generate" else trainer, where, at)
        with pytest.raises(Crash):
            run(asked)
    assert len(records(folder / f"broken-{kind}")) < 6
    assert lasting(run(asked, resume=True)) == whole


def test_the_weight_of_the_divergence_moves_between_rollouts(folder: Path) -> None:
    """By the nats a token that the rollout was away. Kills: one that moves within a rollout, or pays nothing."""
    rollouts, policy = started(folder, OBJECTIVES["ppo"], "adapts")
    steps, weights = rollouts.stream(Cursor()), []
    for number in range(1, 10):
        _, facts = rollouts(next(steps), number)
        weights += [facts["kl_weight"]] if "kl_weight" in facts else []
        if number == 4:
            with torch.no_grad():
                [one.normal_(0, 0.1) for one in policy.model.parameters() if one.requires_grad]
        if number == 5:
            every = [one for rows in rollouts.minibatches for one in rows]
            apart = sum((one.old - one.reference).sum().item() for one in every) / sum(one.actions for one in every)
    assert weights[:2] == [0.05, 0.05 * (1 - 0.1 * 0.2)]
    for one in every:
        written = Written(one.actions, one.reward, one.old, one.reference, one.values)
        earned = PPO(kl=weights[1]).rewards(written)
        torch.testing.assert_close(one.returns, gae(earned, one.values, 1.0, 0.95)[1], rtol=1e-6, atol=1e-7)
    wanted = weights[1] * (1 + 0.1 * min(max(apart / 0.01 - 1, -0.2), 0.2))
    assert weights[2] == pytest.approx(wanted, rel=1e-9)
    assert rollouts.memory["objective.kl"].item() != weights[2]


def test_held_out_answers_earn_what_they_are_worth(folder: Path) -> None:
    """Kills: rewards of drawn answers, of other rows, or with the judge's prompts and the run's answers."""
    train = {"steps": 2, "rows_per_step": 2, "lr": 0.02}
    (folder / "held.jsonl").write_text(
        '{"prompt": "name four", "answer": "four"}\n{"prompt": "say ten", "answer": "x"}\n'
    )
    data = {"train": str(folder / "rows.jsonl"), "eval": str(folder / "held.jsonl")}
    judged = {"metrics": ["exact_match"], "every": 1, "generate": 6}
    done = run(config(folder, {"kind": "grpo", "group": 2, "kl": 0.0}, "held", train=train, data=data, evaluate=judged))
    found = records(done)
    assert all("eval_reward" in record and "eval_exact_match" in record for record in found)
    written = [json.loads(line)["tuned"] for line in (done / "samples.jsonl").read_text().splitlines()]
    assert found[-1]["eval_reward"] == pytest.approx(sum(sum(c in "aeiou" for c in text) / 8 for text in written) / 2)
    assert "Held-out reward" in (done / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_reward_that_can_be_earned_is_earned(kind: str, folder: Path) -> None:
    """Kills: a sign; advantages of another completion; a value head that is not trained."""
    more = {"group": 8, "kl": 0.0} if kind == "grpo" else {"epochs": 2, "minibatches": 1, "kl": 0.0}
    train = {"steps": 20, "rows_per_step": 6 if kind == "grpo" else 48, "micro_batch_rows": 6, "lr": 0.01}
    if kind == "ppo":
        rows = [{"prompt": f"name {number}"} for number in range(96)]
        (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / ("rows.jsonl" if kind == "grpo" else "many.jsonl"))}
    done = run(config(folder, {"kind": kind, **more}, f"learns-{kind}", train=train, data=data, method="full"))
    earned = [record["reward"] for record in records(done) if "reward" in record]
    assert sum(earned[-4:]) / 4 > 1.5 * earned[0]
    assert "Reward" in (done / "report.html").read_text()
    if kind == "ppo":
        from safetensors.torch import load_file

        newest = max((done / "checkpoints").glob("step-??????"))
        assert load_file(newest / "weights.safetensors")["value.weight"].abs().sum() > 0
        assert not any("value" in name for name in load_file(done / "model" / "model.safetensors"))


@pytest.mark.slow
def test_a_run_begins_with_a_copy_of_another(folder: Path) -> None:
    """The reference is what was received, and stays. Kills: a fresh adapter; the base as reference; one that moves."""
    train = {"steps": 4, "rows_per_step": 3, "lr": 0.02}
    first = run(config(folder, {"kind": "sft"}, "sft", train=train))
    data = {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl")}
    judged = {"metrics": ["loss"]}
    more = {"model": str(first), "data": data, "evaluate": judged}
    done = run(config(folder, {"kind": "grpo", "group": 4, "kl": 0.1}, "second", **more))
    assert records(done)[0]["kl"] == 0
    assert records(done)[-1]["kl"] > 0
    before, after = json.loads((done / "eval.json").read_text())["models"][0], open_model(str(done), precision="fp32")
    assert before["name"] == "untuned"
    ours = {name: value.clone() for name, value in after.adapter.parameters.items()}
    theirs = open_model(str(first), precision="fp32").adapter.parameters
    assert all(not torch.equal(value, theirs[name]) for name, value in ours.items() if name.endswith("b"))
    method = {"kind": "lora", "rank": 8, "targets": ["q", "v", "up"]}
    other = config(folder, {"kind": "grpo"}, "third", method=method, model=str(first))
    with pytest.raises(ConfigError, match="its method is that one's: rank: 4 -> 8"):
        run(other)


def test_kept_rollouts_come_back_and_damage_is_noticed(folder: Path) -> None:
    """Kills: a rounded log-probability; a flipped byte that is learnt from."""
    rollouts, _ = started(folder, OBJECTIVES["ppo"], "kept")
    rollouts(next(iter(rollouts.stream(Cursor()))), 1)
    kept = Kept(folder / "kept" / "rollouts", rollouts.prepared.config.train, 4)
    for ours, theirs in zip(rollouts.minibatches, kept.read(1), strict=True):
        one, other = rollouts.collate(ours), rollouts.collate(theirs)
        assert torch.equal(one.ids, other.ids)
        assert all(torch.equal(value, getattr(other.actions, name)) for name, value in vars(one.actions).items())
    [path] = (folder / "kept" / "rollouts").iterdir()
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(CheckpointError, match="damaged"):
        kept.read(1)
    with pytest.raises(CheckpointError, match="are gone"):
        kept.read(2)


def test_what_cannot_be_is_told_before_a_model_is_loaded(folder: Path) -> None:
    """Kills: settings without an effect."""
    method = {"kind": "lora", "rank": 4, "targets": ["q"], "dropout": 0.1}
    train = {"steps": 2, "tokens_per_step": 64}
    with pytest.raises(ConfigError) as caught:
        config(folder, {"kind": "grpo", "reward": "nothing"}, "x", method=method, train=train)
    for part in ("train.rows_per_step", "method.dropout", "'nothing' is no reward"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="no reference beside it"):
        config(folder, {"kind": "grpo"}, "x", method="full")
