"""The real program, killed and stopped at random moments and resumed, ends with the bytes of a run that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from killing import Watched, kill_runs, prepare, results, unbroken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("killing"))


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(folder: Path) -> None:
    """Kills: a checkpoint without moments, cursor or best value; records that are kept twice; judging that is lost."""
    cycles = list(kill_runs(folder, 6, random.randrange(2**32), ("lora", "full")))
    assert [cycle for cycle in cycles if cycle.differs] == []
    assert sum(len(cycle.kills) for cycle in cycles) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "early", "late"),
    [("lora", (signal.SIGTERM, 75), (signal.SIGINT, 130)), ("full", (signal.SIGINT, 130), (signal.SIGTERM, 75))],
)
def test_a_run_that_is_asked_to_stop_saves_and_ends_with_the_same_bytes(
    folder: Path, method: str, early: tuple[int, int], late: tuple[int, int]
) -> None:
    """Kills: an exit code of another signal; a step that is lost or counted twice; a stop before training."""
    whole = unbroken(folder, method) if not (folder / f"{method}-whole").exists() else None
    wanted = whole.results if whole else results(folder / f"{method}-whole")
    out = f"{method}-stopped"
    log = folder / out / "metrics.jsonl"
    for (number, code), steps in ((early, 0), (late, 5)):
        program = Watched(folder, method, out)
        program.ready.wait(300)
        while steps and (not log.exists() or log.read_text().count("\n") < steps) and program.process.poll() is None:
            time.sleep(0.005)
        program.process.send_signal(number)
        assert program.wait() == code, program.told
        assert "--resume" in program.told
        assert "Traceback" not in program.told
    program = Watched(folder, method, out)
    assert program.wait() == 0, program.told
    assert results(folder / out) == wanted
