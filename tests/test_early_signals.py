"""Signals before there is a run: the exit code is the documented one from the first line of the program on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core import signals
from tunesmith.core.errors import Stopped
from tunesmith.run.folder import RunFolder
from tunesmith.run.stopping import stoppable

ROOT = Path(__file__).parents[1]


def struck(folder: Path, module: str, number: signal.Signals, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the program; a signal reaches it when it imports a module, which would take a minute."""
    (folder / f"{module}.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {number.value})\ntime.sleep(60)\nraise ImportError\n"
    )
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "tunesmith", *words],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=50, check=False,
        # whoever starts the tests in the background makes them and their children deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("module", ["typer", "pydantic"])
@pytest.mark.parametrize("words", [("tune", "c.yaml"), ("--debug", "tune", "c.yaml", "--resume")])
def test_a_run_that_is_terminated_while_the_program_loads_exits_with_75(
    tmp_path: Path, module: str, words: tuple[str, ...]
) -> None:
    """Kills: a handler that is set after the command line or the configuration has been imported."""
    answer = struck(tmp_path, module, signal.SIGTERM, *words)
    assert answer.returncode == 75
    assert answer.stderr == "error: stopped before the run began; nothing was changed\n"


def test_other_commands_are_ended_by_it_as_ever(tmp_path: Path) -> None:
    """Kills: an exit code that means a run for a command that has none."""
    assert struck(tmp_path, "pydantic", signal.SIGTERM, "check", "tune").returncode == -signal.SIGTERM


def test_an_interrupt_while_the_program_loads_exits_with_130_and_one_line(tmp_path: Path) -> None:
    """Kills: the trace of an import."""
    answer = struck(tmp_path, "typer", signal.SIGINT, "check", "c.yaml")
    assert (answer.returncode, answer.stderr) == (130, "error: interrupted\n")


def test_a_run_takes_the_signal_over_and_does_not_give_it_back(tmp_path: Path) -> None:
    """Kills: "nothing was changed" after everything was."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        signals.leave_when_terminated()
        with pytest.raises(Stopped) as caught, stoppable(RunFolder(tmp_path)):
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.exit_code == 75
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_of_somebody_else_is_given_back(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable(RunFolder(tmp_path)):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
