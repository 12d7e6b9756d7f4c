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
from fault_asking import WHOLE, ask, edit_json
from fault_cases import alpaca, config, tree

from tunesmith.core.files import FolderLock
from tunesmith.core.yaml import read_yaml_text

NEWEST = "run/checkpoints/step-000004"


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
MORE = [*LOST[:2], *LOST[4:], *BROKEN[1:]]


@pytest.mark.parametrize(
    ("file", "text"), [*LOST[2:4], *BROKEN[:1], *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
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
