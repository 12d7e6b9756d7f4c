"""A list of stages: how it is read, looked at before anything runs, run in its order, and gone on with."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from killing import start
from tiny_folders import tiny_folder

from tunesmith.cli.main import main
from tunesmith.config import as_dict
from tunesmith.core.errors import CheckpointError, ConfigError
from tunesmith.core.yaml import write_yaml_text
from tunesmith.evaluate.report import write_report
from tunesmith.run.opening import find
from tunesmith.run.staged import prepare_stage, run_stages
from tunesmith.run.stages import build_stages, load_stages
from tunesmith.train import trainer

NAMES = ["sft", "reward", "policy"]


class Killed(BaseException):
    """What nobody catches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("stages")
    tiny_folder(found / "model")
    rows = [{"prompt": f"name {word}", "completion": word} for word in ("red", "green", "blue", "one")]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no idea at all"} for row in rows]
    asked = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows]
    for name, found_rows in {"rows": rows, "pairs": pairs, "asked": asked}.items():
        (found / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found_rows))
    return found


def rlhf(folder: Path, out: str = "all") -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "method": {"kind": "lora", "rank": 2, "targets": ["q", "v"]},
        "train": {"steps": 3, "rows_per_step": 2, "micro_batch_rows": 1, "lr": 0.01, "save_every": 1},
        "precision": {"compute": "fp32"},
        "log": [],
        "out": str(folder / out),
        "stages": [
            {"name": "sft", "data": {"train": str(folder / "rows.jsonl")}},
            {"name": "reward", "objective": "reward", "data": {"train": str(folder / "pairs.jsonl")}},
            {
                "name": "policy",
                "model": "stage:sft",
                "data": {"train": str(folder / "asked.jsonl")},
                "objective": {"kind": "grpo", "group": 2, "reward": "stage:reward", "max_new_tokens": 4},
            },
        ],
    }


def problem(raw: dict[str, Any], overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build_stages(raw, "rlhf.yaml", overrides)
    return str(caught.value)


def test_stages_are_sections_over_shared_ones(folder: Path) -> None:
    """Kills: a section that replaces instead of adding; a reference that stays; sizes of two families at once."""
    raw = rlhf(folder)
    raw["stages"][0]["train"] = {"epochs": 1, "tokens_per_step": 64}
    raw["stages"][2]["method"] = "bitfit"
    sft, reward, policy = (as_dict(stage.config) for stage in build_stages(raw).stages)
    assert (sft["train"]["epochs"], sft["train"]["steps"], sft["train"]["lr"]) == (1, None, 0.01)
    assert (sft["train"]["tokens_per_step"], sft["train"]["rows_per_step"]) == (64, None)
    assert reward["train"]["steps"] == 3
    assert [one["out"] for one in (sft, reward, policy)] == [f"{folder}/all/{name}" for name in NAMES]
    assert policy["model"] == sft["out"]
    assert policy["objective"]["reward"] == {"kind": "run", "run": reward["out"]}
    assert policy["method"]["kind"] == "bitfit"
    assert reward["method"] == sft["method"]


def test_an_override_is_of_all_stages_or_of_the_one_it_names(folder: Path) -> None:
    """Kills: a stage whose own key hides an override; a reference that is overwritten."""
    raw = rlhf(folder)
    raw["stages"][1]["train"] = {"steps": 9}
    found = build_stages(raw, overrides=["train.steps=5", "policy.train.steps=6", "model=other", "out=there"])
    assert [stage.config.train.steps for stage in found.stages] == [5, 5, 6]
    assert [stage.config.model for stage in found.stages] == ["other", "other", "there/sft"]


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("model", "stage:policy", "rlhf.yaml, stage policy: model: the stage 'policy' does not come before this one"),
        ("model", "stage:stf", "did you mean sft?"),
        ("train", {"lrr": 1}, "rlhf.yaml, stage policy: train.lrr: unknown key 'lrr'"),
        ("name", "sft", "the name 'sft' is there twice"),
        ("name", "train", "is the name of a section"),
        ("out", "x", "stage policy: out"),
        ("layout", {"data": 2}, "stage policy: layout: a list of stages runs in one process"),
    ],
)
def test_what_is_wrong_with_a_list_names_the_stage(folder: Path, place: str, value: Any, told: str) -> None:
    """Kills: each check of the list, one case a check."""
    raw = rlhf(folder)
    raw["stages"][2][place] = value
    assert told in problem(raw)


def test_a_list_runs_in_one_process(folder: Path) -> None:
    """Kills: stages that begin to wait for processes that nobody started."""
    raw = rlhf(folder)
    raw["stages"][0]["layout"] = {"data": 2}
    assert "stage sft: layout: a list of stages runs in one process" in problem(raw)


def test_problems_of_all_stages_are_told_together(folder: Path) -> None:
    """Kills: stopping at the first stage."""
    raw = rlhf(folder)
    raw["stages"][0]["train"] = raw["stages"][2]["train"] = {"lrr": 1}
    told = problem(raw)
    assert "stage sft: train.lrr" in told
    assert "stage policy: train.lrr" in told


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        (2, {"method": {"rank": 4}}, "method.*rank: 2 -> 4"),
        (1, {"objective": "sft", "data": {"train": "{}/rows.jsonl"}}, "objective.reward.*objective sft"),
        (1, {"method": "full"}, "objective.reward.*method full"),
        (0, {"method": "full"}, "objective.reward.*stands on"),
        (2, {"data": {"train": "{}/none.jsonl"}}, "stage policy: .*none.jsonl"),
    ],
)
def test_a_later_stage_is_looked_at_before_the_first_runs(
    folder: Path, stage: int, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Kills: an hour of training before a mistake that was there to see."""
    raw = json.loads(json.dumps(rlhf(folder)))
    raw["out"] = str(tmp_path / "out")
    raw["stages"][stage] |= json.loads(json.dumps(changes).replace("{}", str(folder)))
    with pytest.raises(Exception, match=told):
        run_stages(build_stages(raw))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    path = folder / "rlhf.yaml"
    path.write_text(write_yaml_text(rlhf(folder)))
    return run_stages(load_stages(path))


@pytest.mark.slow
def test_each_stage_is_a_run_that_begins_where_those_before_it_ended(folder: Path, done: Path) -> None:
    """Kills: a policy that begins with the base; a reward that is another run's; a list that stands for its first."""
    facts = [json.loads((done / name / "run.json").read_text()) for name in NAMES]
    assert [one["status"] for one in facts] == ["finished"] * 3
    assert list(facts[2]["data"]["start"]["sha256"]) == [str(done / "sft" / "adapter")]
    assert any("reward" in path for path in facts[2]["data"]["rewards"]["sha256"])
    assert find(str(done)).adapter == done / "policy" / "adapter"


@pytest.mark.slow
def test_a_list_that_is_killed_goes_on_inside_the_stage_that_was_cut(
    folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program by SIGKILL in the second stage, then by an exception in the third; to the same bytes.

    Kills: a stage that begins again; a check of later stages that asks for what is not there yet.
    """
    program = start(folder, "rlhf", str(folder / "cut"))
    log = folder / "cut" / "reward" / "metrics.jsonl"
    while program.poll() is None and not (log.exists() and log.read_text().count("\n")):
        time.sleep(0.002)
    program.kill()
    assert program.wait() == -signal.SIGKILL, program.communicate()[1]
    assert not (folder / "cut" / "policy").exists()
    seen, cuts = trainer._Run._step, [("policy", 2)]

    def broken(self: Any, step: Any) -> Any:
        if cuts and (self.keeper.checkpoints.folder.parent.name, self.state.step) == cuts[0]:
            cuts.pop(0)
            raise Killed
        return seen(self, step)

    monkeypatch.setattr(trainer._Run, "_step", broken)
    stages = build_stages(rlhf(folder, "cut"))
    with pytest.raises(Killed):
        run_stages(stages, resume=True)
    run_stages(stages, resume=True)
    for name in NAMES:
        ours, whole = (path / name / "adapter" for path in (folder / "cut", done))
        for path in whole.glob("*.safetensors"):
            assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_finished_list_is_left_alone_and_another_is_refused(folder: Path, done: Path) -> None:
    """Kills: stages that run twice; a changed list or stage that goes on as if nothing were."""
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}
    run_stages(load_stages(folder / "rlhf.yaml"), resume=True)
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")} == before
    with pytest.raises(ConfigError, match="holds stages already"):
        run_stages(load_stages(folder / "rlhf.yaml"))
    with pytest.raises(CheckpointError, match=r"stage policy: .*train.steps: 3 -> 4"):
        run_stages(load_stages(folder / "rlhf.yaml", ["policy.train.steps=4"]), resume=True)
    fewer = rlhf(folder)
    fewer["stages"].pop()
    with pytest.raises(CheckpointError, match="the list of stages is not the one"):
        run_stages(build_stages(fewer), resume=True)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run_stages(build_stages(rlhf(folder, "elsewhere")), resume=True)


@pytest.mark.slow
def test_the_report_of_a_list_shows_every_stage(done: Path) -> None:
    """Kills: a page of one stage; a link that leads nowhere; a stage that was never begun and breaks the page."""
    page = write_report(done).read_text()
    for name in NAMES:
        assert f'href="{name}/report.html"' in page
        assert (done / name / "report.html").exists()
    (done / "stages.yaml").write_text("stages: [sft, reward, policy, later]\n")
    assert "Not begun yet" in write_report(done).read_text()
    (done / "stages.yaml").write_text("stages: [sft, reward, policy]\n")


@pytest.mark.slow
def test_check_and_plan_say_what_they_say_of_every_stage(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing there yet. Kills: a command that looks at the first stage alone; a document that is several."""
    path = tmp_path / "rlhf.yaml"
    path.write_text(write_yaml_text({**rlhf(folder), "out": str(tmp_path / "out")}))
    for command in ("check", "plan"):
        with pytest.raises(SystemExit) as ended:
            main([command, str(path), "--json"])
        assert ended.value.code == 0
        assert [stage["name"] for stage in json.loads(capsys.readouterr().out)["stages"]] == NAMES
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--max-batch"])
    assert ended.value.code == 2
    assert "the file has the stages sft reward policy" in capsys.readouterr().err


def test_a_stage_can_be_planned_before_those_it_needs_are_there(folder: Path, tmp_path: Path) -> None:
    """Kills: a plan that asks for files of a run to come."""
    from tunesmith.run.planning import plan_run

    stages = build_stages({**rlhf(folder), "out": str(tmp_path / "out")})
    prepared = prepare_stage(stages, stages.stages[2])
    assert prepared.start is None
    assert plan_run(prepared, calibrated=False).memory.total_bytes > 0
