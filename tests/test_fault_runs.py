"""Runs whose files, disk or folder are not as they should be: named, mended or refused, and never half-written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import alpaca, config, run_here, tree
from safetensors.torch import load_file, save_file
from tiny_folders import tiny_folder
from tiny_models import tiny_model

from tunesmith.core.files import FolderLock
from tunesmith.core.yaml import read_yaml_text

WHOLE = "run/adapter/adapter_model.safetensors"
NEWEST = "run/checkpoints/step-000004"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("good")
    tiny_folder(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(alpaca(24)) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(alpaca(4, 100)) + "\n")
    (folder / "c.yaml").write_text(config())
    return folder


@pytest.fixture(scope="module")
def finished(good: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a finished run."""
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("finished") / "work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(cache))
        patch.chdir(folder)
        assert run_here("tune c.yaml")["code"] == 0
    return folder


@pytest.fixture
def begin(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Copies a folder and goes there."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))

    def copy(source: Path) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "work"))
        monkeypatch.chdir(folder)
        return folder

    return copy


def ask(line: str, code: int, *words: str) -> dict[str, Any]:
    """Runs the program here and checks its exit code, its words and that it has no trace."""
    answer = run_here(line)
    told = answer["out"] + answer["err"]
    assert answer["code"] == code, told
    for word in words:
        assert word in told, told
    assert "Traceback" not in told
    assert "bug in tunesmith" not in told
    assert code == 0 or [part.startswith("error: ") for part in answer["err"].splitlines()].count(True) == 1
    return answer


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def unfinish(folder: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    edit_json(folder / "run" / "run.json", status="running")
    shutil.rmtree(folder / "run" / "adapter")


def flip(path: Path, at: float = 0.6) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# what works although it looks odd

WORKS: dict[str, tuple[str, bytes, int]] = {
    "a byte order mark": ("t.jsonl", b"\xef\xbb\xbf" + "\n".join(alpaca(3)).encode(), 3),
    "line ends of Windows": ("t.jsonl", "\r\n".join(alpaca(3)).encode(), 3),
    "line ends of old Macs": ("t.jsonl", "\r".join(alpaca(3)).encode(), 3),
    "blank lines": ("t.jsonl", "\n\n".join(alpaca(3)).encode(), 3),
    "control characters": ("t.jsonl", b'{"instruction": "a\\u0000\\u001b[31mb", "output": "c"}\n', 1),
    "tokens in the text": ("t.jsonl", b'{"instruction": "<|im_end|>", "output": "<|im_start|>"}\n', 1),
    "a file name of Unicode": ("d\u00e4ta %s \U0001f600.jsonl", "\n".join(alpaca(3)).encode(), 3),
    "one row": ("t.jsonl", alpaca(1)[0].encode(), 1),
}


@pytest.mark.parametrize("name", WORKS)
def test_odd_but_good_rows_are_taken(begin: Any, good: Path, name: str) -> None:
    """Kills: a byte order mark or a carriage return in the first or last key; control characters on the terminal."""
    folder = begin(good)
    file, raw, count = WORKS[name]
    (folder / file).write_bytes(raw)
    answer = ask(shlex.join(["check", "c.yaml", f"data.train={file}", "--json"]), 0)
    assert json.loads(answer["out"])["train"]["kept"] == count
    shown = ask(shlex.join(["check", "c.yaml", f"data.train={file}"]), 0)["out"]
    assert "\x1b" not in shown
    assert "\0" not in shown


def test_a_learning_rate_may_be_written_with_an_exponent(begin: Any, good: Path) -> None:
    """Kills: YAML 1.1, for which 1e-4 is a word."""
    folder = begin(good)
    (folder / "c.yaml").write_text(config(train="{steps: 1, rows_per_step: 1, lr: 1e-4}", evaluate="{}"))
    ask("tune c.yaml", 0)
    assert read_yaml_text((folder / "run/config.yaml").read_text(), "c")["train"]["lr"] == 1e-4


def test_bad_rows_can_be_skipped_and_are_counted(begin: Any, good: Path) -> None:
    folder = begin(good)
    (folder / "t.jsonl").write_text("\n".join([*alpaca(3), "{", "[]"]))
    answer = ask("check c.yaml data.train=t.jsonl data.skip_bad_rows=true --json", 0)
    assert json.loads(answer["out"])["train"]["kept"] == 3
    ask("check c.yaml data.train=t.jsonl --json", 3, "t.jsonl:4", "t.jsonl:5")


def test_a_failure_is_one_json_document_where_that_is_asked_for(begin: Any, good: Path) -> None:
    """Kills: a failure that --json prints as text, or with other keys."""
    begin(good)
    answer = ask("check c.yaml train.lr=abc --json", 2, "train.lr")
    told = json.loads(answer["out"])
    assert set(told) == {"error", "where", "hint", "exit_code"}
    assert told["exit_code"] == 2
    assert "train.lr" in told["where"]


# folders that hold a run

REFUSED: dict[str, tuple[Callable[[Path], object], str, int, tuple[str, ...]]] = {
    "tune again": (lambda f: None, "tune c.yaml", 2, ("run", "--resume", "another out:")),
    "tune into what was begun": (unfinish, "tune c.yaml", 2, ("run", "--resume")),
    "another configuration": (
        lambda f: None, "tune c.yaml --resume train.lr=0.5 method.rank=3", 4,
        ("train.lr: 0.001 -> 0.5", "method.rank: 2 -> 3", "undo the change"),
    ),
    "other training rows": (
        lambda f: (unfinish(f), (f / "train.jsonl").write_text("\n".join(alpaca(25)))),
        "tune c.yaml --resume", 4, ("data.train", "train.jsonl", "put the old file back"),
    ),
    "other rows to judge on": (
        lambda f: (unfinish(f), (f / "eval.jsonl").write_text("\n".join(alpaca(5)))),
        "tune c.yaml --resume", 4, ("data.eval", "eval.jsonl", "put the old file back"),
    ),
    "every checkpoint damaged": (
        lambda f: (unfinish(f), flip(f / NEWEST / "moments.safetensors"),
                   flip(f / "run/checkpoints/step-000002/weights.safetensors")),
        "tune c.yaml --resume", 4, ("no checkpoint can be used", "000004/moments", "000002/weights"),
    ),
    "run.json is no JSON": (
        lambda f: (f / "run/run.json").write_text("{"), "tune c.yaml --resume", 4, ("run.json", "not valid JSON")
    ),
    "run.json is a list": (lambda f: (f / "run/run.json").write_text("[]"), "tune c.yaml --resume", 4, ("run.json",)),
    "config.yaml is cut off": (
        lambda f: (f / "run/config.yaml").write_text("a: ["), "tune c.yaml --resume", 4, ("run/config.yaml",)
    ),
    "config.yaml is a list": (
        lambda f: (f / "run/config.yaml").write_text("- a"), "tune c.yaml --resume", 4, ("run/config.yaml",)
    ),
    "config.yaml is empty": (
        lambda f: (f / "run/config.yaml").write_text(""), "generate run --prompt x", 4, ("run/config.yaml",)
    ),
    "no result yet": (unfinish, "generate run --prompt x", 4, ("run", "no result yet", "--resume")),
    "an export over the run": (lambda f: None, "export run run --to merged", 2, ("run", "exists", "another place")),
    "an export of what has no result": (unfinish, "export run out --to merged", 4, ("run", "no result yet")),
    "a run as the model": (lambda f: None, "check c.yaml model=run", 4, ("run", "a run folder, not a model", "merged")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_go_on_is_left_as_it_is(begin: Any, finished: Path, name: str) -> None:
    """Kills: each check of what a run folder holds; a file written before everything is known to fit."""
    change, line, code, words = REFUSED[name]
    folder = begin(finished)
    change(folder)
    before = contents(folder)
    ask(line, code, *words)
    after = contents(folder)
    for rewritten in ("run/run.json", "run/plan.json"):
        # what is known of the machine and the plan may be said again
        assert (rewritten in after) == (rewritten in before)
        after |= {rewritten: before[rewritten]} if rewritten in before else {}
    assert after == before


def test_resuming_a_finished_run_changes_nothing(begin: Any, finished: Path) -> None:
    folder = begin(finished)
    before = contents(folder)
    ask("tune c.yaml --resume", 0, "finished", "nothing to do")
    assert contents(folder) == before


def test_a_busy_folder_is_named_and_left_alone(begin: Any, finished: Path) -> None:
    """Kills: a lock that is taken too late, or that a dead process still holds."""
    folder = begin(finished)
    unfinish(folder)
    with FolderLock(folder / "run"):
        before = contents(folder)
        ask("tune c.yaml --resume", 7, "run", f"process {os.getpid()}", "wait for it")
        assert contents(folder) == before
    ask("tune c.yaml --resume", 0)


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors", "state.json", "manifest.json"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(begin: Any, finished: Path, file: str) -> None:
    """Kills: a file without a hash; a damaged checkpoint that is used, or that stays where it was."""
    folder = begin(finished)
    expected = (folder / WHOLE).read_bytes()
    unfinish(folder)
    flip(folder / NEWEST / file)
    ask("tune c.yaml --resume", 0, "step-000004", file, "step 2 is used instead", "2 steps are repeated")
    assert (folder / WHOLE).read_bytes() == expected


LOST = [(file, None) for file in ("metrics.jsonl", "run.json", "plan.json", "eval.json", "samples.jsonl")]
BROKEN = [
    ("eval.json", "<"),
    ("eval.json", "{}"),
    ("samples.jsonl", "[]\n"),
    ("plan.json", "<"),
    ("metrics.jsonl", "<"),
]


@pytest.mark.parametrize(("file", "text"), [*LOST, *BROKEN])
def test_a_lost_or_broken_file_of_a_run_does_not_stop_it(
    begin: Any, finished: Path, file: str, text: str | None
) -> None:
    """Kills: answers of the untuned model that are missing from the table after a resume."""
    folder = begin(finished)
    expected = (folder / WHOLE).read_bytes()
    table = (folder / "run/eval.json").read_bytes()
    unfinish(folder)
    (folder / "run" / file).unlink()
    if text is not None:
        (folder / "run" / file).write_text(text)
    ask("tune c.yaml --resume", 0)
    assert (folder / WHOLE).read_bytes() == expected
    assert (folder / "run/eval.json").read_bytes() == table


# models and adapters whose weights tell


def change_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def poison(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")


def drop(tensors: dict[str, Any]) -> None:
    tensors.pop("model.layers.0.input_layernorm.weight")


UNFIT: dict[str, tuple[Callable[[Path], object], str, int, tuple[str, ...]]] = {
    "NaN in the weights": (
        lambda f: change_tensors(f / "model/model.safetensors", poison), "", 4, ("NaN", "layers.1.mlp.up_proj")
    ),
    "a tensor is missing": (
        lambda f: change_tensors(f / "model/model.safetensors", drop), "", 4, ("missing: model.layers.0.input_layer",)
    ),
    "a rank above the maps": (lambda f: None, "method.rank=33", 2, ("method.rank", "33", "at most")),
    "an enormous rank": (lambda f: None, "method.rank=1000000000", 2, ("method.rank", "at most")),
    "a regex that matches nothing": (lambda f: None, '"method.targets=[\'.*x9\']"', 2, ("method.targets",)),
    "more layers than there are": (
        lambda f: None, "'method={kind: top_layers, layers: 9}'", 2, ("method.layers", "9", "2")
    ),
    "a metric without its program": (
        lambda f: os.environ.update(PATH="/nowhere"), "'evaluate.metrics=[meteor]'", 2, ("meteor",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_only_the_model_can_tell_leaves_no_run_behind(
    begin: Any, good: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a run folder that stays after a mistake, so that the mended configuration is refused."""
    change, overrides, code, words = UNFIT[name]
    folder = begin(good)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    change(folder)
    before = tree(folder)
    ask(f"tune c.yaml {overrides}", code, *words)
    left = set(tree(folder)) - set(before)
    assert left <= {"run", "run/.lock"}
    ask("tune c.yaml --resume", 4, "nothing to resume")


def grow(tensors: dict[str, Any]) -> None:
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = torch.cat([tensors[name]] * 2)


def rename(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "w_proj")] = tensors.pop(name)


def another_base(folder: Path) -> None:
    tiny_model("llama", seed=5, vocab_size=400).save_pretrained(folder / "model")
    edit_json(folder / "run/adapter/adapter_config.json", base_model_name_or_path=str(folder / "model"))


ADAPTERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another base": (another_base, ("another base model", "fingerprint")),
    "another rank": (lambda f: change_tensors(f / WHOLE, grow), ("lora_A", "[4, 32] instead of [2, 32]")),
    "other names": (lambda f: change_tensors(f / WHOLE, rename), ("missing", "unexpected", "q_proj", "w_proj")),
    "cut off": (lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:200]), ("damaged", WHOLE)),
    "no tensors": (lambda f: (f / WHOLE).unlink(), ("missing", WHOLE)),
    "a pickle": (lambda f: (f / WHOLE).rename((f / WHOLE).with_suffix(".bin")), ("missing", "pickle", "safetensors")),
    "config is no JSON": (
        lambda f: (f / "run/adapter/adapter_config.json").write_text("{"), ("adapter_config.json", "not valid JSON")
    ),
    "config is a list": (lambda f: (f / "run/adapter/adapter_config.json").write_text("[]"), ("adapter_config.json",)),
    "NaN": (
        lambda f: change_tensors(f / WHOLE, lambda t: [v.fill_(float("nan")) for v in t.values()]), ("NaN", WHOLE)
    ),
    "unknown method": (
        lambda f: edit_json(f / "run/adapter/adapter_config.json", peft_type="VERA", tunesmith_method=None),
        ("VERA", "adapter_config.json"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(begin: Any, finished: Path, name: str) -> None:
    """Kills: loading an adapter of another model, rank or name in part, or with fresh numbers instead."""
    change, words = ADAPTERS[name]
    folder = begin(finished)
    change(folder)
    ask("generate run --prompt x --max-tokens 2", 4, *words)
    ask("export run out --to merged", 4)
    assert not (folder / "out").exists()


def test_a_run_is_used_from_any_folder(begin: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a relative model path of the configuration that is looked for where the user happens to be."""
    folder = begin(finished)
    monkeypatch.chdir("/")
    ask(f"generate {folder}/run --prompt x --max-tokens 2 --json", 0)


def test_numbers_that_are_none_stop_the_run_with_its_rows(begin: Any, good: Path) -> None:
    folder = begin(good)
    ask("tune c.yaml train.lr=100 train.clip=0 method=full train.steps=30", 6, "train.jsonl:", "train.lr", "step")
    assert not (folder / "run/model").exists()


# the disk

NEEDS_MOUNT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0
    or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs root and mount namespaces",
)  # fmt: skip


def mounted(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script in a mount namespace of its own; $TUNESMITH is the program."""
    paths = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    program = f"{sys.executable} -m tunesmith"
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script],
        env={**os.environ, "TUNESMITH": program, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@NEEDS_MOUNT
@pytest.mark.parametrize("place", ["disk", "disk/new/run"])
def test_a_read_only_place_is_told_before_anything_is_read(begin: Any, good: Path, place: str) -> None:
    begin(good)
    done = mounted(f"mkdir disk; mount -t tmpfs -o ro none disk; exec $TUNESMITH tune c.yaml out={place}")
    assert done.returncode == 5, done.stderr
    assert "read-only" in done.stderr
    assert "choose another out:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "rows" not in done.stderr


@NEEDS_MOUNT
@pytest.mark.slow
@pytest.mark.parametrize("pages", [1, 4, 8, 12, 16, 20, 24])
def test_a_full_disk_is_told_and_the_run_goes_on_with_more_room(begin: Any, finished: Path, pages: int) -> None:
    """Kills: half a file that a full disk leaves and that is read later; an exit code that hides it."""
    folder = begin(finished)
    expected = (folder / WHOLE).read_bytes()
    done = mounted(
        f"mkdir disk; mount -t tmpfs -o size={4 * pages}k none disk; code=0\n"
        "$TUNESMITH tune c.yaml out=disk/run 2> first.txt || code=$?\n"
        "mount -o remount,size=9m disk; resume=\n"
        "if [ -e disk/run/config.yaml ]; then resume=--resume; fi\n"
        "$TUNESMITH tune c.yaml out=disk/run $resume 2> second.txt; cp -r disk/run after; exit $code"
    )
    first = (folder / "first.txt").read_text()
    assert "Traceback" not in first
    assert done.returncode == 5, first
    assert "the disk is full" in first
    assert "disk/run" in first
    assert (folder / "after/adapter/adapter_model.safetensors").read_bytes() == expected
    assert not [path for path in tree(folder / "after") if ".tmp" in path]
