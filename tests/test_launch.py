"""The line that starts several processes, who is refused it, and what becomes of a run whose process is killed."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from killing import prepare
from killing_ranks import TWO, kill_runs

from tunesmith.cli.main import main
from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError
from tunesmith.parallel.launch import Launch
from tunesmith.parallel.layout import LayoutSection


def write(folder: Path, layout: str) -> Path:
    (folder / "train.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    path = folder / "run.yaml"
    path.write_text(f"model: m\ndata: {{train: train.jsonl}}\ntrain: {{steps: 1}}\nout: r\nlayout: {layout}\n")
    return path


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    told = capsys.readouterr()
    return int(caught.value.code or 0), told.out, told.err


def test_launch_prints_the_line_of_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a line that tunes something else, or loses its overrides; printing anything besides."""
    path = write(tmp_path, "{data: 4, shard: zero1}")
    code, out, _ = ended(capsys, "launch", str(path), "train.lr=1e-4", "--resume")
    wanted = f"torchrun --standalone --nproc-per-node 4 -m tunesmith tune {path} train.lr=1e-4 --resume\n"
    assert (code, out) == (0, wanted)
    code, out, _ = ended(capsys, "launch", str(path), "--nodes", "2", "--endpoint", "first")
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint first:29500" in out
    assert "--nproc-per-node 2 -m tunesmith tune" in out


def test_a_batch_script_fills_in_what_slurm_knows() -> None:
    """Kills: quotes that keep the shell from its variables; a run that loses what the last minutes have brought."""
    script = Launch(LayoutSection(data=8), ["tune", "my run.yaml"], nodes=2).slurm()
    assert '--rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID"' in script
    assert "'my run.yaml'" in script
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --signal=TERM@" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_processes_that_do_not_fit_on_the_machines_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 processes cannot be spread evenly over 3 machines"):
        Launch(LayoutSection(data=4), ["tune"], nodes=3)


def test_tune_refuses_a_layout_of_several_processes_with_the_line_that_starts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: training a part of the rows; a hint that does not run."""
    path = write(tmp_path, "{data: 2}")
    code, _, told = ended(capsys, "tune", str(path), "out=x")
    assert code == 2
    assert "layout: a layout of 2 processes, and this is one process" in told
    assert f"hint: torchrun --standalone --nproc-per-node 2 -m tunesmith tune {path} out=x" in told


@pytest.mark.parametrize(("layout", "size"), [("{data: 2}", "3"), ("{}", "2")])
def test_another_number_of_processes_than_the_layout_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: str, size: str
) -> None:
    """Kills: processes that each train everything, into one folder."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    code, _, told = ended(capsys, "tune", str(write(tmp_path, layout)))
    assert code == 2
    assert f"torchrun has started {size}" in told


def test_launch_refuses_a_layout_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = ended(capsys, "launch", str(write(tmp_path, "{}")))
    assert code == 2
    assert "hint: tunesmith tune" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layout": {"shard": "zero1"}}, "shard: zero1 has no effect on one process"),
        ({"layout": {"tensor": 2}, "train": {"steps": 1, "optimizer_state": "int8"}}, "tensor cuts between them"),
        ({"layout": {"data": 2, "shard": "zero3"}, "precision": {"base": "nf4"}}, "zero3 splits numbers"),
        ({"layout": {"pipeline": 2}, "precision": {"compute": "fp16"}}, "fp16 and its loss scaling are not there"),
        ({"layout": {"data": 2}, "train": {"steps": 1, "cache_trunk": 9}}, "is for one process"),
        (
            {
                "layout": {"data": 2, "shard": "zero3"},
                "evaluate": {"metrics": ["bleu"], "every": 1},
                "train": {"steps": 1, "stop": {"metric": "bleu"}},
            },
            "zero3 has no whole model to write with",
        ),
    ],
)
def test_settings_that_several_processes_cannot_have_are_refused(changes: dict[str, Any], told: str) -> None:
    base = {"model": "m", "data": {"train": "t.jsonl", "eval": "e.jsonl"}, "train": {"steps": 1}, "out": "r"}
    with pytest.raises(ConfigError, match=told):
        build_config(base | changes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TWO, ("layout.pipeline=2",)])
def test_a_process_killed_anywhere_ends_all_in_time_and_the_run_goes_on_with_any_number(
    tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """Kills: survivors that wait for ever; a rank that nobody names; a step that is lost; half a checkpoint in force.

    `python tests/killing_ranks.py 20` does more of it, and goes on with four processes, too.
    """
    seed = random.randrange(2**32)
    cycles = list(kill_runs(prepare(tmp_path), 1, seed, layout, others=(1,)))
    assert all(cycle.is_right for cycle in cycles), (seed, cycles)
    assert sum(len(cycle.kills) for cycle in cycles) == 1
