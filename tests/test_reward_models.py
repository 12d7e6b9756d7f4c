"""A reward model as the reward of a policy: its scores are those of its own run, and are learnt from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_preference_runs import config as reward_config
from test_preference_runs import pairs
from test_rollouts import Crash, config, crashing, lasting
from tiny_folders import tiny_folder
from tiny_runs import records

from tunesmith.core.errors import ConfigError
from tunesmith.data.batch import to_batch
from tunesmith.data.pack import Cursor
from tunesmith.evaluate.rewards import open_rewards
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE
from tunesmith.run import run
from tunesmith.run.opening import open_model
from tunesmith.run.prepare import prepare
from tunesmith.run.reward_models import RewardModels
from tunesmith.run.rollouts import Rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts, and a reward model on it."""
    found = tmp_path_factory.mktemp("scored")
    tiny_folder(found / "model")
    rows = "".join(f'{{"prompt": "the {noun} was", "answer": "fine"}}\n' for noun in ("film", "book", "song"))
    (found / "rows.jsonl").write_text(rows)
    (found / "own.py").write_text("def one(prompt, completion, row):\n    return 1\n")
    run(reward_config(found, found / "model", pairs(), out=str(found / "reward")))
    (found / "rows.jsonl").write_text(rows)  # the reward run's own rows have the same name
    return found


def rewarded(folder: Path, out: str, *others: Any, weight: float = 0.5, group: int = 4, **changes: Any) -> Any:
    reward = [{"kind": "run", "run": str(folder / "reward"), "weight": weight}, *others]
    return config(folder, {"kind": "grpo", "group": group, "kl": 0.0, "reward": reward}, out, **changes)


def test_completions_earn_what_the_reward_model_says_of_them_alone(folder: Path) -> None:
    """Kills: another route, head or weight; a document without its end token; a reward that reads its neighbours."""
    prepared = prepare(rewarded(folder, "asked", f"{folder}/own.py:one"))
    loaded = open_model(str(folder / "model"), precision="fp32").loaded
    adapter = prepared.config.method.attach(loaded, seed=0)
    (folder / "asked").mkdir()
    rollouts = Rollouts(prepared, loaded, Policy(loaded, adapter.route), BASE, folder / "asked")
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())
    trains = {id(parameter) for parameter in adapter.parameters.values()}
    assert not any(one.requires_grad for one in loaded.model.parameters() if id(one) not in trains)
    step, _ = rollouts(next(rollouts.stream(Cursor())), 1)
    judge = open_model(str(folder / "reward"), precision="fp32")
    alone = Policy(judge.loaded, judge.route)
    for one in (one for rows in step.micro_batches for one in rows):
        with torch.no_grad():
            score = alone.scores(to_batch([one.example])).item()
        assert one.reward == pytest.approx(1 + 0.5 * score, rel=1e-5, abs=1e-6)
        assert one.example.ids[-1] in prepared.train.template.stop_ids or not one.stopped


def test_a_policy_learns_to_please_its_reward_model(folder: Path) -> None:
    """Kills: a score with the wrong sign; one that is not seen by the advantages."""
    train = {"steps": 40, "rows_per_step": 3, "micro_batch_rows": 3, "lr": 0.02, "schedule": "constant"}
    done = run(rewarded(folder, "pleased", weight=1.0, group=16, train=train))
    earned = [record["reward"] for record in records(done)]
    assert sum(earned[-8:]) / 8 > sum(earned[:8]) / 8 + 0.2


@pytest.mark.slow
def test_a_run_that_is_cut_off_while_it_is_judged_goes_on_bit_for_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a reward model that has changed; scores of completions that are not those of the rollout."""
    whole = lasting(run(rewarded(folder, "whole")))
    asked = rewarded(folder, "broken")
    with monkeypatch.context() as patch:
        crashing(patch, RewardModels, "scores", 6)  # the first is of the constant, and a rollout has one
        with pytest.raises(Crash):
            run(asked)
    assert len(records(folder / "broken")) == 4
    assert lasting(run(asked, resume=True)) == whole


def test_a_base_that_trains_cannot_hold_a_reward_model(folder: Path) -> None:
    """Kills: a judge that changes with the policy that it judges."""
    with pytest.raises(ConfigError, match="changes the base that the reward model stands on"):
        rewarded(folder, "whole", method="full")


@pytest.mark.parametrize("what", ["nothing", "sft"])
def test_a_folder_that_scores_nothing_is_no_reward(folder: Path, what: str, tmp_path: Path) -> None:
    """Kills: a run without a head whose base would answer."""
    place = tmp_path / "nothing"
    if what == "sft":
        place = run(config(folder, {"kind": "sft"}, "sft", data={"train": str(write_answers(tmp_path))}))
    with pytest.raises(ConfigError, match="no run with an adapter" if what == "nothing" else "no head that scores"):
        open_rewards([{"kind": "run", "run": str(place)}])[0].check_there()


def write_answers(folder: Path) -> Path:
    path = folder / "answers.jsonl"
    path.write_text('{"prompt": "the film was", "completion": "fine"}\n' * 4)
    return path
