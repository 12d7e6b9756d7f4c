"""A sweep: exact sizes under a budget, trials that are run once, whatever ends them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_cases import alpaca
from tiny_folders import tiny_folder
from typer.testing import CliRunner
from warm import Warm

from tunesmith.adapt.methods import METHODS
from tunesmith.cli.main import app
from tunesmith.cli.sweep import _count
from tunesmith.config import load_config
from tunesmith.core.errors import CheckpointError, ConfigError
from tunesmith.models.load import meta
from tunesmith.run.spaces import SPACES, Counter, Wanted, choose, title
from tunesmith.run.sweep import Order, Sweep, plan_sweep
from tunesmith.run.sweeping import run_sweep

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SETTINGS = """
model: model
data: {train: train.jsonl, eval: eval.jsonl, max_length: 64}
train: {steps: 4, rows_per_step: 4, micro_batch_rows: 4, lr: 1.0e-2, save_every: 2}
evaluate: {metrics: [loss], generate: 6}
precision: {compute: fp32}
out: out
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_folder(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(alpaca(24)) + "\n")
    (tmp_path / "eval.jsonl").write_text("\n".join(alpaca(4, 100)) + "\n")
    (tmp_path / "general.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 4)
    (tmp_path / "s.yaml").write_text(SETTINGS)
    return tmp_path


def planned(*methods: str, budget: int | None = 1000, seeds: int = 1, **more: Any) -> Sweep:
    wanted = {name: more.pop(name) for name in ("within", "grid", "ranks") if name in more}
    order = Order(Wanted(budget, methods=methods, **wanted), seeds, forgetting="general.txt", **more)
    return plan_sweep(load_config("s.yaml"), order)


def hashes(folder: Path) -> dict[str, str]:
    """Every file of the trials, as they are on the disk."""
    files = [file for file in (folder / "out" / "trials").rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file): f"{hashlib.sha256(file.read_bytes()).hexdigest()} {file.stat().st_mtime_ns}" for file in files}


# what is tried


def test_every_size_is_counted_by_attaching_and_within_the_budget(folder: Path) -> None:
    """Kills: a formula instead of a count; a budget that is met on average."""
    count = Counter(lambda: meta("model"))
    chosen = choose(Wanted(1000, within=0.1), count)
    fits = [one for one in chosen.settings if one.why == "budget"]
    assert {one.method.kind for one in fits} >= {"lora", "adapter"}
    for one in chosen.settings:
        adapter = one.method.attach(meta("model"))
        assert sum(value.numel() for value in adapter.parameters.values()) == one.parameters
        assert one.why != "budget" or abs(one.parameters - 1000) <= 100, one.name
    assert len({one.name for one in chosen.settings}) == len(chosen.settings)


def test_methods_of_a_fixed_size_come_along_as_references(folder: Path) -> None:
    chosen = choose(Wanted(1000, methods=("full", "bitfit", "lora")), Counter(lambda: meta("model")))
    assert {one.name for one in chosen.settings if one.why == "reference"} == {"full", "bitfit"}


def test_a_variant_is_asked_for_by_its_name(folder: Path) -> None:
    wanted = Wanted(1000, within=0.1, methods=("lora-q", "adapter-lin", "full"))
    chosen = choose(wanted, Counter(lambda: meta("model")))
    assert [one.name for one in chosen.settings] == ["lora-q-r8", "adapter-lin-6", "full"]
    assert wanted.kinds == {"lora", "adapter", "full"}


def test_what_does_not_fit_is_left_out_with_its_nearest_size(folder: Path) -> None:
    """128 numbers a rank on q: 1,000 are 7.8 of them. Kills: a row that is silently missing."""
    chosen = choose(Wanted(1000, within=0.005, methods=("lora",)), Counter(lambda: meta("model")))
    assert chosen.settings == []
    assert "rank 8: 1,024" in chosen.left_out["lora-q"]


def test_a_grid_spends_one_budget_on_every_choice_of_weights(folder: Path) -> None:
    """Seven cells, as in the LoRA paper. Kills: a rank that is the same for all; a cell that is dropped."""
    found = choose(Wanted(3600, within=0.1, grid=True, ranks=(1, 2)), Counter(lambda: meta("model")))
    cells = {tuple(one.method.targets): one for one in found.settings if one.why == "budget"}
    left = {name.removeprefix("lora-") for name in found.left_out}
    assert {"".join(targets) for targets in cells} | left == {"q", "k", "v", "o", "qk", "qv", "qkvo"}
    assert all(abs(one.parameters - 3600) <= 360 for one in cells.values())
    ranks = [(tuple(one.method.targets), one.method.rank) for one in found.settings if one.why == "ranks"]
    assert ranks == [(targets, rank) for targets in (("q",), ("q", "v"), ("q", "k", "v", "o")) for rank in (1, 2)]


def test_a_sweep_knows_every_method(folder: Path) -> None:
    """Kills: a method that is added and never compared."""
    assert set(METHODS.table) - {"peft"} <= set(SPACES)


def test_a_wrong_request_is_told_before_anything_is_opened(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no method of a sweep"):
        Wanted(1000, methods=("lorra",))
    with pytest.raises(ConfigError, match="how many parameters"):
        Wanted(None)
    with pytest.raises(ConfigError, match="no effect"):
        planned("lora", lrs={"full": 1e-3})
    (folder / "s.yaml").write_text(SETTINGS.replace("metrics: [loss], ", ""))
    with pytest.raises(ConfigError, match="needs a score"):
        planned("lora")


@pytest.mark.parametrize("packing", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_prediction_head_is_counted_beside_the_budget(folder: Path, packing: str) -> None:
    """Kills: a budget that pays for the head; a padded batch that cannot be planned without numbers."""
    tiny_folder(folder / "bert", "bert")
    rows = [json.dumps({"text": f"row {at}", "label": ("no", "yes")[at % 2]}) for at in range(12)]
    (folder / "labels.jsonl").write_text("\n".join(rows) + "\n")
    text = SETTINGS.replace("model: model", "model: bert\nobjective: predict").replace("[loss]", "[accuracy]")
    text = re.sub("data: .*", f"data: {{train: labels.jsonl, eval: labels.jsonl, packing: {packing}}}", text)
    (folder / "s.yaml").write_text(text)
    sweep = planned("lora", "linear_probe", budget=1024)
    sizes = {one.name: one.parameters for one in sweep.choice.settings}
    wanted = {"lora-q-r8": 1024, "lora-qv-r4": 1024, "lora-qkvo-r2": 1024, "linear_probe": 0}
    assert {name: sizes.get(name) for name in wanted} == wanted
    assert sweep.head_parameters == 2 * 32 + 2
    assert sweep.plans["linear_probe"]["parameters"]["trainable"] == 2 * 32 + 2


@pytest.mark.parametrize(
    ("text", "count"), [("1.2M", 1_200_000), ("300k", 300_000), ("294,912", 294_912), ("1B", 10**9)]
)
def test_a_budget_is_written_as_people_write_it(text: str, count: int) -> None:
    assert _count(text) == count


def test_names_of_rows_are_names_of_folders() -> None:
    assert title("lora", {"targets": ["q", "v"], "rank": 16}) == "lora-qv-r16"
    assert title("lora", {"targets": ["attn", "mlp"], "dora": True, "rank": 2}) == "lora-attn+mlp-dora-r2"
    assert title("adapter", {"style": "lin", "size": 8}) == "adapter-lin-8"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("sweep-*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_benchmarks_ask_for_what_there_is(path: Path) -> None:
    """Kills: a variant that was renamed and left in a command."""
    config = load_config(path)
    command = " ".join(line.lstrip("# ").rstrip("\\") for line in path.read_text().splitlines()[1:3]).split()
    wanted = Wanted(_count(command[command.index("--budget") + 1]), methods=tuple(command[-1].split(",")))
    assert len(wanted.tries) >= 8
    assert config.evaluate.metrics
    assert command[2].endswith(path.name)


def test_a_dry_run_shows_what_would_be_run_and_runs_nothing(folder: Path) -> None:
    words = (
        "sweep s.yaml --budget 1k --within 0.1 --methods lora,full --dry-run --json --forgetting none --lr full=1e-3"
    )
    result = CliRunner().invoke(app, words.split())
    found = json.loads(result.stdout)
    assert {one["name"]: one["lr"] for one in found["settings"]}["full"] == 1e-3
    assert found["trials"] == 3 * len(found["settings"])
    assert not (folder / "out").exists()


# running it


@pytest.mark.slow
def test_a_finished_trial_is_not_run_again_and_a_seed_more_runs_only_that(folder: Path) -> None:
    """Kills: a resume that begins anew; trials that are known by their order and not by their settings."""
    found = run_sweep(planned("lora-q", "full", within=0.03, seeds=1))
    names = [row["name"] for row in found["rows"]]
    assert names == ["lora-q-r8", "full"]
    assert not found["partial"]
    before = hashes(folder)
    again = run_sweep(planned("lora-q", "full", within=0.03, seeds=1))
    assert hashes(folder) == before
    assert again["rows"] == found["rows"]
    more = run_sweep(planned("lora-q", "full", within=0.03, seeds=2))
    assert [row["finished"] for row in more["rows"]] == [2, 2]
    assert {name: now for name, now in hashes(folder).items() if name in before} == before
    for row in more["rows"]:
        assert row["score"]["low"] < row["score"]["mean"] < row["score"]["high"]
        assert row["peak_bytes"] > 0
        assert row["cpu_seconds"] > 0
        assert row["forgetting"] is not None
        assert row["bytes"] > 4 * row["parameters"]
    lora, full = more["rows"] if more["rows"][0]["kind"] == "lora" else reversed(more["rows"])
    assert lora["parameters"] == 1024
    # how much slower is the machine's business; that both were measured is ours
    assert min(lora["latency"][how]["ratio"] for how in ("unmerged", "merged")) > 0
    assert full["latency"] is None
    assert lora["spectrum"]["largest_rank"] <= 8
    assert not list((folder / "out").rglob("checkpoints"))
    assert all((folder / "out" / name).exists() for name in ("sweep.json", "table.md", "sweep.html", "base/eval.json"))
    (folder / "s.yaml").write_text(SETTINGS.replace("steps: 4", "steps: 5"))
    with pytest.raises(CheckpointError, match=r"train\.steps: 4 -> 5"):
        planned("lora-q", "full", within=0.03)


@pytest.mark.slow
def test_a_trial_that_diverges_is_recorded_and_the_others_run(folder: Path) -> None:
    """Kills: one failure that ends a night's work; a failure that is tried again each time."""
    # at a rate of 100 each step turns matrices over and makes them 89 times as large; biases do not decay
    text = SETTINGS.replace("steps: 4", "steps: 24, weight_decay: 0.9, schedule: constant, warmup: 0.0")
    (folder / "s.yaml").write_text(text)
    lrs = {"full": 100.0}
    found = run_sweep(planned("full", "bitfit", lrs=lrs))
    by = {row["name"]: row for row in found["rows"]}
    assert by["bitfit"]["score"] is not None
    assert by["full"]["score"] is None
    assert "not a finite number" in by["full"]["failures"][0]["error"]
    before = hashes(folder)
    run_sweep(planned("full", "bitfit", lrs=lrs))
    assert hashes(folder) == before


@pytest.mark.slow
def test_minutes_end_a_sweep_in_the_middle_of_a_trial_and_the_next_goes_on(folder: Path) -> None:
    """Kills: a budget that waits for the trial; a partial table that does not say so; lost steps."""
    (folder / "s.yaml").write_text(SETTINGS.replace("steps: 4", "steps: 100000"))
    found: dict[str, Any] = {}
    for _ in range(20):  # until the base has been judged, which has its own time
        found = run_sweep(planned("bitfit", minutes=0.15))
        if found and list((folder / "out").rglob("manifest.json")):
            break
    assert found["partial"]
    assert "PARTIAL: 0 of 1 trials" in (folder / "out" / "table.md").read_text()
    steps = len((folder / "out/trials/bitfit-s0/metrics.jsonl").read_text().splitlines())
    assert 0 < steps < 100000
    run_sweep(planned("bitfit", minutes=0.15))
    assert len((folder / "out/trials/bitfit-s0/metrics.jsonl").read_text().splitlines()) > steps


@pytest.mark.slow
def test_halving_gives_full_runs_to_the_better_half_of_the_better_half(folder: Path) -> None:
    """Kills: full runs for all; short runs that are made again; a choice that is another the next time."""
    methods = ("full", "bitfit", "ia3", "top_layers")
    found = run_sweep(planned(*methods, halving=True))
    assert len(found["rows"]) == 1
    reasons = found["left_out"].values()
    assert sorted(reason.partition(" steps: loss ")[0].rsplit(" ", 1)[1] for reason in reasons) == ["1", "1", "2"]
    assert not found["partial"]
    facts = {path.parent.name: json.loads(path.read_text()) for path in trials("out")}
    short = [name for name in facts if name.endswith("-1steps")]
    best = sorted(short, key=lambda name: facts[name]["metrics"]["loss"]["value"])[:2]
    assert {name for name in facts if name.endswith("-2steps")} == {name.replace("-1s", "-2s") for name in best}
    before = hashes(folder)
    assert run_sweep(planned(*methods, halving=True))["rows"] == found["rows"]
    assert hashes(folder) == before


@pytest.mark.slow
def test_halving_chooses_among_the_cells_of_a_grid(folder: Path) -> None:
    """Seven cells, then three, then one. Kills: a grid that is run whole; a table of ranks that needs all its cells."""
    more = {"within": 0.1, "grid": True, "ranks": (1,), "halving": True}
    chosen = {one.name for one in planned(**more).choice.settings}
    assert len(chosen) == 7
    found = run_sweep(planned(**more))
    [row] = found["rows"]
    assert {row["name"], *(name for name, why in found["left_out"].items() if "steps: loss" in why)} == chosen
    assert len(trials("out")) == 7 + 3 + 1
    assert not found["partial"]
    assert "steps: loss" in Path("out/table.md").read_text()


def test_halving_without_optuna_is_told_before_anything_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a night of short runs after which nobody can choose."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    (folder / "train.jsonl").unlink()
    words = "sweep s.yaml --budget 1k --methods full,bitfit --forgetting none --halving"
    result = CliRunner().invoke(app, words.split())
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'tunesmith[sweep]'" in str(result.exception)
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_a_plan_of_halving_tells_its_short_runs(folder: Path) -> None:
    words = "sweep s.yaml --budget 1k --methods full,bitfit,ia3,top_layers --forgetting none --halving --dry-run"
    told = " ".join(CliRunner().invoke(app, words.split()).stdout.split())
    assert "4 short runs of 1 steps and 2 short runs of 2 steps, then 3 trials" in told


def trials(out: str) -> list[Path]:
    """What ended, the base aside."""
    return sorted(Path(out).glob("trials/*/trial.json"))


def start(folder: Path, *more: str, methods: str = "lora-q,full") -> Warm:
    words = ["sweep", "s.yaml", "--budget", "1k", "--methods", methods, "--within", "0.03", "--seeds", "2"]
    return Warm("tunesmith", *words, "--forgetting", "general.txt", *more, folder=folder)


def wait_for(pattern: str, folder: Path, program: Warm) -> None:
    while not list(folder.glob(pattern)):
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_killed_keeps_its_finished_trials_and_leaves_nothing_running(
    folder: Path, number: signal.Signals
) -> None:
    """Kills: a half-written result that is believed; a finished trial that is run again; an exit code of success."""
    program = start(folder)
    wait_for("out/trials/*/trial.json", folder, program)
    wait_for("out/trials/*-s*/config.yaml", folder, program)
    done = {str(path): path.read_bytes() for path in (folder / "out").glob("trials/*/trial.json")}
    program.send_signal(number)
    assert program.wait(60) == (75 if number == signal.SIGTERM else -number)
    assert quiet(folder)
    again = start(folder)
    assert again.wait(300) == 0, again.stderr.read()
    for path, content in done.items():
        assert Path(path).read_bytes() == content
    found = json.loads((folder / "out" / "sweep.json").read_text())
    assert (found["partial"], found["finished"], found["trials"]) == (False, 4, 4)


@pytest.mark.slow
def test_a_halving_that_is_killed_chooses_as_one_that_is_not(folder: Path) -> None:
    """Killed among the short runs. Kills: survivors of those that happened to be done; short runs made twice."""
    methods = "full,bitfit,ia3,top_layers"
    program = start(folder, "--halving", methods=methods)
    wait_for("out/trials/*-1steps/trial.json", folder, program)
    done = {str(path): path.read_bytes() for path in trials("out")}
    program.kill()
    program.wait(60)
    assert quiet(folder)
    assert len(done) < 4
    again = start(folder, "--halving", methods=methods)
    assert again.wait(300) == 0, again.stderr.read()
    assert {path: Path(path).read_bytes() for path in done} == done
    whole = run_sweep(planned(*methods.split(","), seeds=2, halving=True, out="whole"))
    found = json.loads((folder / "out" / "sweep.json").read_text())
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in whole["rows"]]
    assert found["left_out"] == whole["left_out"]
    assert (found["partial"], found["finished"], found["trials"]) == (False, 2, 2)


@pytest.mark.slow
def test_a_trial_does_not_outlive_its_sweep(folder: Path) -> None:
    """A trial that would run for an hour. Kills: a process that trains on for nobody."""
    program = start(folder, "train.steps=100000", "train.save_every=1000")
    wait_for("out/trials/*/metrics.jsonl", folder, program)
    program.kill()
    program.wait(60)
    assert quiet(folder)


def quiet(folder: Path) -> bool:
    """Whether nothing works in a folder any more, soon."""
    deadline = time.monotonic() + 30
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(folder)


def alive(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            at = os.readlink(process / "cwd")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if at == str(folder) and state != "Z" and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found
