"""Runs of the real program that are killed at random moments and resumed, beside one that is not.

`python tests/killing.py 50` kills fifty times, lora, full and ppo in turn, or what is named behind the number, and
prints a table; exit 1 where a byte differs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_cases import alpaca, config
from warm import Warm

METHODS = {
    "lora": "method: {kind: lora, rank: 2, targets: [q, v, down], dropout: 0.1}\nprecision: {compute: fp32}\n",
    "full": "method: full\nprecision: {compute: bf16}\n",
    "ppo": "method: {kind: lora, rank: 2, targets: [q, v, down]}\nprecision: {compute: fp32}\nobjective: {kind: ppo, "
    "reward: {kind: regex, pattern: '[aeiou]'}, epochs: 2, minibatches: 2, max_new_tokens: 8, kl_target: 0.05}\n",
}
SETTINGS = config(
    method=None,
    precision=None,
    train="{steps: 60, rows_per_step: 3, micro_batch_rows: 2, save_every: 3, keep: 2, lr: 1e-2, "
    "stop: {metric: chrf, patience: 1000}}",
    evaluate="{metrics: [loss, chrf], every: 7, generate: 8, shots: 1}",
)
ASIDE = ("_seconds", "_per_second", "_bytes")


def prepare(folder: Path) -> Path:
    """A folder with a model, rows and a configuration for each method."""
    from tiny_folders import tiny_folder

    tiny_folder(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(alpaca(24)) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(alpaca(4, 100)) + "\n")
    for name, method in METHODS.items():
        (folder / f"{name}.yaml").write_text(SETTINGS + method)
    return folder


def start(folder: Path, method: str, out: str, *words: str, command: str = "tune") -> Warm:
    """Begins a run, or goes on with it where one was begun; further words are overrides and options."""
    resume = ["--resume"] if (folder / out / "config.yaml").exists() else []
    paths = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TUNESMITH_CACHE": str(folder / "cache")}
    words = ("tunesmith", command, f"{method}.yaml", f"out={out}", *words, *resume)
    return Warm(*words, folder=folder, environment=environment)


class Watched:
    """A running program, what it has said, and when it was ready to work: imported, checked and planned."""

    def __init__(self, folder: Path, method: str, out: str, *words: str, command: str = "tune") -> None:
        self.process = start(folder, method, out, *words, command=command)
        self.lines: list[str] = []
        self.ready, self.ready_at = threading.Event(), 0.0
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if "on this machine" in line:
                self.ready_at = time.monotonic()
                self.ready.set()
        self.ready.set()

    @property
    def told(self) -> str:
        return "".join(self.lines)

    def wait(self) -> int:
        code = self.process.wait(timeout=300)
        self.reader.join()
        return code


def results(run: Path) -> dict[str, bytes]:
    """Everything of a finished run that must not depend on when it was killed."""
    newest = max((run / "checkpoints").glob("step-??????"))
    wanted = [*newest.glob("*.safetensors"), newest / "state.json", run / "eval.json", run / "samples.jsonl"]
    wanted += run.glob("rollouts.jsonl")
    wanted += [file for part in ("adapter", "model") for file in (run / part).glob("*.safetensors")]
    found = {str(file.relative_to(run)): file.read_bytes() for file in sorted(wanted)}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in record.items() if not key.endswith(ASIDE)} for record in records]
    found["metrics.jsonl"] = json.dumps(kept).encode()
    return found


def phase(run: Path, told: str) -> str:
    """What a process was doing when it was killed, as far as its traces tell."""
    if not (run / "config.yaml").exists():
        return "starting"
    if any(run.glob("checkpoints/.*")):
        return "saving"
    if any(path.name.endswith(".tmp") for path in run.rglob(".*")):
        return "writing"
    lines = [line for line in told.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    words = {"before": "judging before", "with": "judging before", "after": "judging after", "step": "training"}
    return next((what for word, what in words.items() if last.startswith(word)), "loading")


@dataclass
class Cycle:
    """One run from its beginning to its end, and every kill on the way.

    Attributes:
        kills: for each, the last step that was recorded and what was going on.
        differs: files that are not those of the unbroken run.
    """

    method: str
    out: str
    kills: list[tuple[int, str]] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Whole:
    """A run that nothing happens to: its results, and the seconds until it worked and from then on."""

    results: dict[str, bytes]
    loading_seconds: float
    working_seconds: float


def unbroken(folder: Path, method: str) -> Whole:
    """Runs a method to its end."""
    began = time.monotonic()
    program = Watched(folder, method, f"{method}-whole")
    assert program.wait() == 0, program.told
    loading = program.ready_at - began
    return Whole(results(folder / f"{method}-whole"), loading, time.monotonic() - program.ready_at)


def kill(program: Watched, whole: Whole, draw: random.Random) -> None:
    """Sends SIGKILL: one in five times anywhere from the start, else anywhere in the work."""
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, whole.loading_seconds))
    else:
        program.ready.wait(300)
        time.sleep(draw.uniform(0, 0.8 * whole.working_seconds))
    program.process.send_signal(signal.SIGKILL)


def kill_runs(folder: Path, kills: int, seed: int = 0, methods: tuple[str, ...] = tuple(METHODS)) -> Iterator[Cycle]:
    """Kills runs until there have been enough kills; every run is resumed until it ends by itself."""
    draw = random.Random(seed)
    expected = {method: unbroken(folder, method) for method in methods}
    number = 0
    while kills > 0:
        method = methods[number % len(methods)]
        cycle = Cycle(method, f"{method}-{number}")
        number += 1
        run = folder / cycle.out
        allowed = min(kills, draw.randint(3, 7))
        while True:
            program = Watched(folder, method, cycle.out)
            if len(cycle.kills) < allowed:
                kill(program, expected[method], draw)
            code = program.wait()
            if code != -signal.SIGKILL:
                assert code == 0, program.told
                break
            log = run / "metrics.jsonl"
            steps = log.read_text().count("\n") if log.exists() else 0
            cycle.kills.append((steps, phase(run, program.told)))
        kills -= len(cycle.kills)
        found, wanted = results(run), expected[method].results
        cycle.differs = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        shutil.rmtree(run)
        yield cycle


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    methods = tuple(sys.argv[2:]) or tuple(METHODS)
    with tempfile.TemporaryDirectory() as place:
        folder = prepare(Path(place))
        total, bad = 0, 0
        for cycle in kill_runs(folder, kills, int(time.time()), methods):
            total += len(cycle.kills)
            bad += bool(cycle.differs)
            told = ", ".join(f"{what} at {steps}" for steps, what in cycle.kills) or "never"
            print(f"{cycle.method:5} killed {len(cycle.kills)}: {told}", flush=True)
            print(f"      {'differs: ' + ' '.join(cycle.differs) if cycle.differs else 'the same, byte for byte'}")
        print(f"{total} kills, {bad} runs that differ")
        sys.exit(bool(bad))


if __name__ == "__main__":
    main()
