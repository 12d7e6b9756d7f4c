"""Whatever is wrong, the program says so: the right exit code, one line that names the place and the mend, no trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_cases import CASES

HERE = Path(__file__).parent


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "TUNESMITH_CACHE": str(folder),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80",
    }  # fmt: skip


@pytest.fixture(scope="session")
def answers(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the program says to every case, all run by one process."""
    place = tmp_path_factory.mktemp("cases")
    for number, case in enumerate(CASES.values()):
        case.make(Path(shutil.copytree(good, place / str(number))))
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_cases.py"), str(place)],
        env=environment(place / "cache"), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer.pop("name"): answer for answer in found}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_named_with_its_place_and_its_mend(answers: dict[str, dict[str, Any]], name: str) -> None:
    """Kills: a check that is left out, moved behind the import of torch, or answers with another exit code."""
    case, answer = CASES[name], answers[name]
    told = answer["err"]
    assert answer["code"] == case.code, told
    assert [line.startswith("error: ") for line in told.splitlines()].count(True) == 1
    for word in case.words:
        assert word in told, told
    assert "Traceback" not in told
    assert "bug in tunesmith" not in told
    assert "\x1b" not in told
    assert answer["left"] == []
    assert answer["heavy"] == []


REAL = [
    "settings: lr is a word", "settings: targets that match nothing", "yaml: key twice", "usage: unknown command",
    "usage: generate without prompt", "data: UTF-16", "data: truncated JSON", "data: missing path",
    "model: no tokenizer", "model: truncated weights", "out: a file in the way",
]  # fmt: skip
PROGRAM = """
import atexit, sys
atexit.register(lambda: print([name for name in ("torch", "transformers") if name in sys.modules]))
from tunesmith.cli.main import main
main()
"""


@pytest.mark.parametrize(
    "name",
    [name if name in REAL[::3] else pytest.param(name, marks=pytest.mark.slow) for name in REAL],
)
def test_the_program_itself_says_so_without_torch(good: Path, tmp_path: Path, name: str) -> None:
    """Kills: an exit code that is lost on the way out of the process; a heavy import before the check."""
    case = CASES[name]
    folder = Path(shutil.copytree(good, tmp_path / "work"))
    case.make(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *case.command.split()],
        cwd=folder, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == case.code, done.stderr
    assert all(word in done.stderr for word in case.words), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout.strip() == "[]"
