"""Trials: ordinary runs, each in a process of its own, so that its peak memory and its end are its own.

The one idea: what a trial is worth is on the disk (`trial.json` beside the run's files), so that a sweep that is killed
anywhere goes on where it was. What is measured of a finished run is `measuring.py`; who runs when is `sweep.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import Config, as_dict, build_config, differences
from tunesmith.core.errors import CheckpointError, ConfigError, DataError, DivergedError, ModelError, TunesmithError
from tunesmith.core.files import canonical_json, read_json, write_atomic
from tunesmith.core.signals import TERMINATED
from tunesmith.run.folder import RunFolder

FACTS, LOG = "trial.json", "log.txt"
# imported once, in the process that others are forked from
PRELOADED = [
    "tunesmith.run.trials", "tunesmith.run.measuring", "tunesmith.train.trainer", "tunesmith.models.load",
    "tunesmith.models.generate", "tunesmith.models.policy", "tunesmith.adapt.store", "tunesmith.plan.trace",
]  # fmt: skip
# what would fail again: the same settings on the same data
LASTING = (ConfigError, DataError, ModelError, DivergedError)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of the row of the table that it belongs to.
        seed: `train.seed`.
        config: of the run; `out` is its folder.
        forgetting: general text whose loss is measured afterwards, or None.
        base: the base model by itself: it is judged, and nothing trains.
        timed: its latency is measured.
    """

    name: str
    seed: int
    config: Config
    forgetting: str | None = None
    base: bool = False
    timed: bool = True

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def facts(self) -> dict[str, Any] | None:
        """What it came to, {status: finished | failed, ...}; None while it has not ended."""
        path = self.folder / FACTS
        found = read_json(path, CheckpointError) if path.exists() else None
        if found is not None and (not isinstance(found, dict) or "status" not in found):
            raise CheckpointError("damaged: not the facts of a trial", where=str(path), hint="delete it")
        return found

    @property
    def steps_done(self) -> int:
        """Optimizer updates so far, from the run's own records."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as stream:
                return sum(line.endswith(b"\n") for line in stream)
        except OSError:
            return 0

    def check(self) -> None:
        """Raises CheckpointError where its folder holds a run of other settings."""
        run = RunFolder(self.folder)
        changed = differences(run.config, as_dict(self.config)) if run.exists else []
        if changed:
            raise CheckpointError(
                "a trial of other settings is here: " + "; ".join(changed),
                where=str(self.folder),
                hint="take another --out, or the old settings",
            )


def carry_out(trial: Trial, deadline: float | None, tick: Callable[[], None]) -> dict[str, Any]:
    """Runs a trial in a process of its own and answers its facts.

    Args:
        deadline: `time.monotonic()` at which it saves and stops, to be resumed another time.
        tick: called several times a second.

    The status is finished, failed, or stopped; the latter two have an `error`. A failure that settings cannot have
    caused (memory, disk, killed from outside) leaves no facts behind, so that the next sweep tries again.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    plain = (as_dict(trial.config), trial.forgetting, trial.base, trial.timed)
    process = context.Process(target=_work, args=plain, daemon=True)
    process.start()
    try:
        while process.is_alive():
            process.join(0.2)
            tick()
            if deadline is not None and time.monotonic() > deadline:
                process.terminate()
                deadline = None
    except BaseException:
        process.terminate()  # it saves what it has
        process.join()
        raise
    facts = trial.facts
    if process.exitcode in (TERMINATED, -signal.SIGTERM):
        return {"status": "stopped", "error": "out of minutes"}
    if facts is None:
        return {"status": "failed", "error": _last_words(trial, process.exitcode), "exit_code": process.exitcode}
    return facts


def _last_words(trial: Trial, code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code}" + (", maybe for its memory" if code == -signal.SIGKILL else "")
    lines = (trial.folder / LOG).read_text("utf-8", "replace").splitlines() if (trial.folder / LOG).exists() else []
    told = [line for line in lines if line.startswith("error: ")]
    return told[-1].removeprefix("error: ") if told else f"ended with exit code {code}"


# in the process of the trial


def _work(raw: dict[str, Any], forgetting: str | None, base: bool, timed: bool) -> None:
    """Carries a trial out and leaves its facts; the exit code is that of `tunesmith tune`."""
    from tunesmith.run.measuring import measure_base

    _leave_with_parent()
    began = time.monotonic()
    config = build_config(raw)
    with open(Path(config.out) / LOG, "ab", buffering=0) as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    try:
        facts = measure_base(config, forgetting) if base else _tuned(config, forgetting, timed)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LASTING):
            told = {"status": "failed", "error": str(error).splitlines()[0], "exit_code": error.exit_code}
            _write(config, told)
        sys.exit(error.exit_code)
    _write(config, {"status": "finished", **facts, "trial_seconds": round(time.monotonic() - began, 3)})


def _write(config: Config, facts: dict[str, Any]) -> None:
    write_atomic(Path(config.out) / FACTS, canonical_json(facts, indent=1) + "\n")


def _tuned(config: Config, forgetting: str | None, timed: bool) -> dict[str, Any]:
    from tunesmith.run import run
    from tunesmith.run.measuring import measure

    folder = RunFolder(config.out)
    run(config, resume=folder.exists, before=False)
    return measure(folder, config, forgetting, timed=timed)


def _leave_with_parent() -> None:
    """Ends this process when the sweep dies: nobody would read what it does. Its checkpoints stay."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
