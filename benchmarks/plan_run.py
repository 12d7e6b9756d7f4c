"""One run, counted: python benchmarks/plan_run.py CASE FOLDER writes FOLDER/CASE.json, planned and measured.

The one idea: the run is an ordinary one, `tunesmith.run`, with a mode around it that counts the storages alive and the
phase it is in. Weights are walked once they are loaded; whatever is made after that is counted from above. The same
training is then run again without the mode, in the same process, for its time.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import _disable_current_modes

import tunesmith.run as running
from benchmarks.plan_cases import config_of
from tunesmith.config import Config, build_config
from tunesmith.plan.trace import LiveStorages
from tunesmith.train import step as stepping
from tunesmith.train import trainer as training
from tunesmith.train.held import storage_bytes
from tunesmith.train.log import peak_bytes

MORE_STEPS = 1  # of the run that is timed: those that were counted have warmed up


class Phased(LiveStorages):
    """Counts as `LiveStorages` does, and keeps the most alive in each phase apart."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.peaks = "load", {"load": 0}

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Counts for a phase inside, and for the one before after it."""
        before, self.phase = self.phase, phase
        self._see()
        try:
            yield
        finally:
            self.phase = before

    def _hold(self, tensor: torch.Tensor) -> None:
        super()._hold(tensor)
        self._see()

    def _see(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now_bytes)


class Watch:
    """What is seen of a run while it runs."""

    def __init__(self) -> None:
        self.loading, self.live = Phased(), Phased()
        self.weights_bytes = self.resident_bytes = self.resident_loaded_bytes = 0
        self.records: list[dict[str, Any]] = []
        self.parts: dict[str, int] = {}

    def install(self) -> None:
        """Puts the watch around what `tunesmith.run` calls."""
        self._load()
        self._around(running, "_carry_out", self.live, "attach", counts=True)
        self._around(stepping, "_one_by_one", self.live, "forward")
        self._around(training, "update", self.live, "step")
        self._around(training.Keeper, "save", self.live, "save")
        self._around(training.Precision, "backward", self.live, "backward")
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.run.judging import Judge

        self._around(Adapter, "save", self.live, "save")
        for name in ("before", "after"):
            self._around(Judge, name, self.live, "evaluate")
        self._train()

    def _load(self) -> None:
        load = running._load

        def loading(prepared: Any, compute: str) -> Any:
            with self.loading:
                loaded = load(prepared, compute)
            model = loaded.model
            self.weights_bytes = storage_bytes([*model.parameters(), *model.buffers()])
            self.resident_loaded_bytes = peak_bytes()
            return loaded

        running._load = loading

    def _around(self, owner: Any, name: str, live: Phased, phase: str, *, counts: bool = False) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*given: Any, **named: Any) -> Any:
            if not counts:
                with live.within(phase):
                    return inner(*given, **named)
            with live, live.within(phase):
                return inner(*given, **named)

        setattr(owner, name, outer)

    def _train(self) -> None:
        inner = training.train

        def twice(tuned: Any, stream_from: Any, objective: Any, settings: Any, precision: Any, folder: Path,
                  **named: Any) -> Any:  # fmt: skip
            with self.live.within("train"):
                result = inner(tuned, stream_from, objective, settings, precision, folder, **named)
            self.parts = {key: value for key, value in result.ranks[0].items() if key.endswith("_bytes")}
            self.resident_bytes = peak_bytes()
            named |= {"total_steps": MORE_STEPS, "observers": (), "resume": False}
            more = settings.model_copy(update={"steps": MORE_STEPS, "save_every": 1000})
            with _disable_current_modes():
                inner(tuned, stream_from, objective, more, precision, folder / "timed", **named)
            lines = (folder / "timed" / "metrics.jsonl").read_text().splitlines()
            self.records = [json.loads(line) for line in lines]
            return result

        training.train = twice

    def found(self) -> dict[str, Any]:
        """What was measured, in bytes and seconds."""
        made = max(self.live.peaks.values())
        cpu = [record["cpu_seconds"] for record in self.records]
        return {
            "weights_bytes": self.weights_bytes,
            "phases": {"load": self.loading.peaks["load"]}
            | {phase: self.weights_bytes + peak for phase, peak in self.live.peaks.items() if phase != "load"},
            "peak_bytes": self.weights_bytes + made,
            "held": self.parts,
            "resident_bytes": self.resident_bytes,
            "resident_loaded_bytes": self.resident_loaded_bytes,
            "cpu_seconds": cpu,
            "seconds": [record["step_seconds"] for record in self.records],
            "tokens": [record["tokens"] for record in self.records],
        }


def speed(config: Config) -> dict[str, float]:
    """How fast the machine was just after the run: beside other jobs that changes within minutes."""
    from tunesmith.models.source import resolve
    from tunesmith.plan.calibration import calibrate
    from tunesmith.plan.shape import read_shape
    from tunesmith.train import precision

    with tempfile.TemporaryDirectory() as folder:
        shape, tokens = read_shape(resolve(config.model)), config.train.micro_batch_tokens or 1024
        compute = precision.resolve(config.precision)
        return asdict(calibrate(shape, tokens, compute, base=config.precision.base, folder=Path(folder)))


def main() -> None:
    """Runs one case and writes what was planned and measured."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    config = build_config(config_of(name, folder))
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    watch = Watch()
    watch.install()
    running.run(config)
    planned = json.loads((out / "plan.json").read_text())
    shutil.rmtree(out)
    found = {"case": name, "planned": planned, "measured": watch.found(), "calibration": speed(config)}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
