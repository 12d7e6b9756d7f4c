"""Runs a planned sweep: one trial after the other, what is done kept, the table up to date after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tunesmith.core.amounts import in_time
from tunesmith.core.errors import ModelError, Stopped
from tunesmith.core.progress import progress_bar
from tunesmith.evaluate.sweep_rows import higher_is_better
from tunesmith.run import say
from tunesmith.run.folder import RunFolder, check_writable, locked
from tunesmith.run.halving import survivors
from tunesmith.run.stopping import stoppable
from tunesmith.run.sweep import Sweep
from tunesmith.run.sweep_files import drop_checkpoints, write_sweep
from tunesmith.run.trials import Trial, carry_out


class _OutOfTime(Exception):
    """The minutes are over; what is left waits for the next time."""


def run_sweep(sweep: Sweep) -> dict[str, Any]:
    """Runs what has not been run, and answers sweep.json; beside it are table.md and sweep.html.

    A trial that fails is told and recorded, and the others run.

    Raises:
        Stopped: after a signal, with everything kept.
        ModelError: the base model cannot be judged.
        ResourceError, BusyError: the folder cannot be written, or another sweep is at work in it.
    """
    folder = RunFolder(sweep.folder)
    check_writable(folder.path)
    with locked(folder):
        runner = _Runner(sweep)
        try:
            with stoppable(folder):
                runner.run()
        except Stopped as stopped:
            told = "stopped; what is done is kept"
            hint = "the same command goes on"
            raise Stopped(told, where=str(folder.path), hint=hint, exit_code=stopped.exit_code) from stopped
        finally:
            found = runner.write()
        return found


class _Runner:
    """Runs trials in order.

    Attributes:
        failed: what the machine, not the settings, kept from ending: trial to its facts; tried again next time.
        settings: those that get full runs.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        minutes = sweep.order.minutes
        self.deadline = time.monotonic() + 60 * minutes if minutes is not None else None
        self.failed: dict[str, dict[str, Any]] = {}
        self.settings = list(sweep.choice.settings)

    def run(self) -> None:
        """The base, then short runs where halving is asked for, then every seed of every setting."""
        try:
            facts = self._facts(self.sweep.base, [])
            if facts["status"] != "finished":
                raise ModelError(f"the base model cannot be judged: {facts['error']}", where=str(self.sweep.folder))
            if self.sweep.order.halving:
                self._halve()
            trials = self.sweep.trials(self.settings)
            for place, trial in enumerate(trials):
                self._facts(trial, trials[place:])
                self.write()
        except _OutOfTime:
            say("out of minutes; the same command goes on")

    def write(self) -> dict[str, Any]:
        """Writes the sweep's files from what is on the disk, and answers sweep.json."""
        return write_sweep(self.sweep, self.settings, self.failed)

    def _halve(self) -> None:
        """Short runs choose: of a quarter of the steps, then of half; `halving.py` says who goes on."""
        for steps in self.sweep.rungs:
            if len(self.settings) < 2:
                return  # there is nothing to choose
            trials = [self.sweep.trial(one, self.sweep.config.train.seed, steps) for one in self.settings]
            found = [self._facts(trial, trials[place:]) for place, trial in enumerate(trials)]
            self._go_on({trial.name: facts for trial, facts in zip(trials, found, strict=True)}, steps)

    def _go_on(self, found: dict[str, dict[str, Any]], steps: int) -> None:
        """Keeps the settings that survive a rung; why the others do not is told beside the table."""
        metric = self.sweep.metric
        scores = {
            name: facts["metrics"][metric]["value"] if facts["status"] == "finished" else None
            for name, facts in found.items()
        }
        kept = survivors(scores, higher_is_better(metric))
        self.settings = [setting for setting in self.settings if setting.name in kept]
        for name, score in scores.items():
            if name in kept:
                continue
            told = found[name]["error"] if score is None else f"{metric} {score:.4g}"
            self.sweep.choice.left_out[name] = f"not of the better half after {steps} steps: {told}"

    def _facts(self, trial: Trial, remaining: Sequence[Trial]) -> dict[str, Any]:
        """What a trial came to; it is run now if it has not ended before. Raises _OutOfTime."""
        facts = trial.facts
        if facts is not None:
            return facts
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise _OutOfTime
        name, steps = trial.folder.name, self._steps(trial)
        with progress_bar(f"{name}: {self._work(trial, remaining)}", steps, bytes_=False) as advance:
            facts = carry_out(trial, self.deadline, lambda: advance(trial.steps_done, steps))
        if facts["status"] == "stopped":
            say(f"{name}: saved after step {trial.steps_done}")
            raise _OutOfTime
        if facts["status"] == "failed":
            self.failed[name] = facts
            say(f"{name}: failed: {facts['error']}")
        elif not trial.base:
            drop_checkpoints(trial.folder)
            score = facts["metrics"][self.sweep.metric]["value"]
            say(f"{name}: {self.sweep.metric} {score:.4g}")
        return facts

    # how long it takes

    def _work(self, trial: Trial, remaining: Sequence[Trial]) -> str:
        if trial.base:
            return "judging the base model"
        left = sum(self._expected(one) for one in remaining)
        rows = self.sweep.rows_per_step
        return f"{self._steps(trial)} steps of {rows:.3g} rows; {len(remaining)} trials left, about {in_time(left)}"

    def _steps(self, trial: Trial) -> int:
        return 0 if trial.base else trial.config.train.steps or int(self.sweep.plans[trial.name]["steps"])

    def _expected(self, trial: Trial) -> float:
        """Seconds of a trial: those of other seeds of its row, or as planned and what the others took besides."""
        plans = self.sweep.plans
        planned = self._planned(trial)
        done = [
            (one.name, facts["trial_seconds"], self._planned(one))
            for one in self.sweep.trials(self.settings)
            if (facts := one.facts) is not None and "trial_seconds" in facts
        ]
        same = [seconds for name, seconds, _ in done if name == trial.name]
        if same and trial.config.train.steps in (None, plans[trial.name]["steps"]):
            return fmean(same)
        besides = fmean(seconds - expected for _, seconds, expected in done) if done else 0.0
        return max(1.0, planned + besides)

    def _planned(self, trial: Trial) -> float:
        plan = self.sweep.plans[trial.name]
        share = (trial.config.train.steps or plan["steps"]) / max(1, plan["steps"])
        return float(plan["seconds"] or 0.0) * share
