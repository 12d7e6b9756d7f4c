"""Rows that a model writes: the best of several by a reward, kept as a file, cut and gone on with."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_folders import tiny_folder

from tunesmith.core.errors import ConfigError
from tunesmith.evaluate.best_of import divergence_bound, expected_best
from tunesmith.run import drawing as module
from tunesmith.run.drawing import Drawing, draw_rows, read_rewards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("drawing")
    tiny_folder(found / "model")
    rows = [
        {"prompt": f"name {word}", "answer": word}
        for word in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
    ]
    (found / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found / "own.py").write_text("def size(prompt, completion, row):\n    return len(completion) / 10\n")
    return found


def draw(folder: Path, out: Path, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rewards = read_rewards([f"{folder}/own.py:size"])
    drawing = Drawing(**{"samples": 5, "max_tokens": 6, "temperature": 1.0, "rewards": rewards, **settings})
    told = draw_rows(str(folder / "model"), str(folder / "rows.jsonl"), str(out), drawing, None, "auto")
    return [json.loads(line) for line in out.read_text().splitlines()], told


def test_the_best_of_several_earns_the_mean_over_all_subsets() -> None:
    """Against every subset, and the law of uniform draws. Kills: a biased estimate; one that is off by one place."""
    rewards = [0.3, -1.0, 2.0, 0.3, 0.7]
    for count in range(1, 6):
        wanted = np.mean([max(some) for some in combinations(rewards, count)])
        assert expected_best(rewards, count) == pytest.approx(wanted, rel=1e-12)
    draws = np.random.default_rng(0).random((4000, 6))
    found = np.mean([expected_best(list(some), 3) for some in draws])
    assert found == pytest.approx(3 / 4, abs=0.01)  # of uniform draws k / (k + 1)


def test_the_divergence_of_the_best_is_that_of_its_own_distribution() -> None:
    """Of many equally likely answers without ties, by summing. Kills: log n alone; a bound that is none."""
    outcomes = 100_000
    places = np.arange(1, outcomes + 1) / outcomes
    for count in (1, 2, 4, 16):
        best = places**count - (places - 1 / outcomes) ** count  # the chance that the best is this one
        exact = (best * np.log(np.maximum(best * outcomes, 1e-300))).sum()
        assert exact == pytest.approx(divergence_bound(count), abs=1e-3)


def test_the_best_answer_of_each_prompt_is_kept(folder: Path, tmp_path: Path) -> None:
    """Kills: the worst, the last, or one of another prompt; a curve that falls."""
    best, told = draw(folder, tmp_path / "best.jsonl")
    every, _ = draw(folder, tmp_path / "all.jsonl", above=-1.0)
    assert told["prompts"] == len(best) == 12
    for row in best:
        rivals = [one["reward"] for one in every if one["messages"][:-1] == row["messages"][:-1]]
        assert row["reward"] == max(rivals)
        assert row["reward"] == len(row["messages"][-1]["content"]) / 10
    assert [one["n"] for one in told["best_of"]] == [1, 2, 4, 5]
    means = [one["reward"] for one in told["best_of"]]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(sum(row["reward"] for row in best) / 12)
    some, _ = draw(folder, tmp_path / "some.jsonl", above=1.0)
    assert some == [row for row in every if row["reward"] >= 1.0]


def test_a_command_that_was_cut_ends_with_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: draws that depend on what was drawn before; half a line that is believed; answers of other settings."""
    monkeypatch.setattr(module, "CHUNK", 4)
    whole, _ = draw(folder, tmp_path / "whole.jsonl")
    seen, calls = module._Writer.__call__, []

    def broken(self: Any, prompts: Any, number: int) -> Any:
        calls.append(number)
        if calls in ([0, 1], [0, 1, 1, 2]):
            raise KeyboardInterrupt
        return seen(self, prompts, number)

    monkeypatch.setattr(module._Writer, "__call__", broken)
    out, part = tmp_path / "cut.jsonl", tmp_path / "cut.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        draw(folder, out)
    assert not out.exists()
    part.write_bytes(part.read_bytes() + b'[[{"text": "half')
    with pytest.raises(ConfigError, match="holds answers of another model"):
        draw(folder, out, seed=1)
    with pytest.raises(KeyboardInterrupt):
        draw(folder, out)
    assert draw(folder, out)[0] == whole
    assert calls == [0, 1, 1, 2, 2]
    assert not part.exists()
    with pytest.raises(ConfigError, match="exists already"):
        draw(folder, out)


def test_every_chunk_draws_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a seed that chunks share, with which the same places of all draw alike."""
    (folder / "same.jsonl").write_text('{"prompt": "name it", "answer": "a"}\n' * 4)
    monkeypatch.setattr(module, "CHUNK", 2)
    drawing = Drawing(max_tokens=6, temperature=1.0)
    out = tmp_path / "same.jsonl"
    draw_rows(str(folder / "model"), str(folder / "same.jsonl"), str(out), drawing, None, "auto")
    assert len({json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()}) == 4


def test_rows_are_of_a_format_that_is_learnt_from(folder: Path, tmp_path: Path) -> None:
    """Only the new answer, with the prompt as it was given. Kills: a prompt that is rendered twice, or learnt."""
    from tunesmith.config import build_config
    from tunesmith.run.prepare import prepare

    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    draw_rows(str(folder / "model"), str(data), str(out), Drawing(max_tokens=6), None, "auto")
    raw = {"model": str(folder / "model"), "train": {"steps": 1}, "out": str(tmp_path / "run")}
    old, new = (prepare(build_config({**raw, "data": {"train": str(path)}})) for path in (data, out))
    asked = old.train.prompt_ids(old.train.dialogue(0, 0))
    example = new.train.example(0, 0)
    assert example.ids[: len(asked)] == asked
    assert not any(example.supervised[: len(asked)])
    assert all(example.supervised[len(asked) : len(asked) + 2])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples": 2, "temperature": 0.0}, "the same at temperature 0"),
        ({"samples": 2, "rewards": ()}, "needs a reward"),
        ({"above": 1.0, "rewards": (), "samples": 1}, "no effect without a reward"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], told: str, folder: Path, tmp_path: Path) -> None:
    """Kills: each check, one case a check."""
    with pytest.raises(ConfigError, match=told):
        draw(folder, tmp_path / "x.jsonl", **settings)
