"""Runs of several processes of which one is killed at a random moment: all end in time, and the run goes on anywhere.

`python tests/killing_ranks.py 20` kills twenty times in runs of two processes with zero3 and prints a table; exit 1
where one was not noticed or named, where the resumed run is not the unbroken one bit for bit, or where one or four
processes end with another loss. `--layout "layout.data=2 layout.shard=zero1"` takes another layout.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from killing import Watched, Whole, prepare, results

# no dropout, which is drawn for each process apart: the loss does not depend on how many there are
SETTINGS = ("train.stop=null", "evaluate.metrics=[loss]", "evaluate.every=7", "method.dropout=0")
SETTINGS += ("train.rows_per_step=12", "train.micro_batch_rows=1")  # a step takes long enough to be killed in
TWO = ("layout.data=2", "layout.shard=zero3")
OTHERS = {1: (), 4: ("layout.data=4", "layout.shard=zero3")}
NOTICED_SECONDS = 60.0
SAME_LOSS = 1e-5
STEPS = 60  # of `killing.SETTINGS`


@dataclass(frozen=True)
class Kill:
    """One process killed.

    Attributes:
        rank, step, doing: which, after how many recorded steps, and what was going on.
        code, seconds: what the launch ended with, and after how long.
        is_named: whether the rank and the reason were said.
    """

    rank: int
    step: int
    doing: str
    code: int
    seconds: float
    is_named: bool

    @property
    def is_right(self) -> bool:
        return self.code == 8 and self.is_named and self.seconds < NOTICED_SECONDS


@dataclass
class Cycle:
    """One run from its beginning to its end, and every kill on the way.

    Attributes:
        differs: files that are not those of the unbroken run.
        losses: relative distance of the last loss, by processes that went on after the last kill.
    """

    kills: list[Kill] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        near = all(loss <= SAME_LOSS for loss in self.losses.values())
        return near and not self.differs and all(kill.is_right for kill in self.kills)


def begin(folder: Path, out: str, layout: tuple[str, ...]) -> Watched:
    """A run, begun or gone on with."""
    if not layout:
        return Watched(folder, "lora", out, *SETTINGS)
    return Watched(folder, "lora", out, *SETTINGS, *layout, "--run", command="launch")


def ranks_of(program: Watched, size: int) -> list[psutil.Process]:
    """The processes of a launch, by rank, once all are there."""
    while program.process.poll() is None:
        children = psutil.Process(program.process.pid).children(recursive=True)
        found = sorted((child for child in children if "tune" in words(child)), key=lambda child: child.pid)
        if len(found) == size:
            return found
        time.sleep(0.01)
    raise AssertionError(program.told)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def steps_of(run: Path) -> int:
    """That were recorded."""
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def phase(run: Path, program: Watched, first: int) -> str:
    """What was going on, as far as traces tell."""
    if not program.ready.is_set():
        return "starting"
    if any(run.glob("checkpoints/.*")):
        return "saving"
    step = steps_of(run)
    return "loading" if step == first else "ending" if step == STEPS else "training"


def kill_one(program: Watched, whole: Whole, run: Path, draw: random.Random) -> Kill | None:
    """SIGKILL to one of two processes: before it works, in a step, or while it saves; None where it was too late."""
    first, ranks = steps_of(run), ranks_of(program, 2)
    when = draw.random()
    if when < 0.2:
        time.sleep(draw.uniform(0, whole.loading_seconds))
    else:
        step = draw.randint(first, min(first + 10, STEPS - 1))
        while program.process.poll() is None and (
            steps_of(run) < step or (when > 0.6 and not any(run.glob("checkpoints/.*")))
        ):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
    rank, began = draw.randrange(2), time.monotonic()
    try:
        ranks[rank].send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return None
    step, doing = steps_of(run), phase(run, program, first)
    code = program.wait()
    if code == 0:
        return None  # its work was done
    named = f"rank {rank}: " in program.told
    return Kill(rank, step, doing, code, time.monotonic() - began, named)


def kill_runs(
    folder: Path, kills: int, seed: int, layout: tuple[str, ...] = TWO, others: tuple[int, ...] = tuple(OTHERS)
) -> Iterator[Cycle]:
    """Kills until there have been enough kills; every run goes on in two processes, and in other numbers of them."""
    draw = random.Random(seed)
    began = time.monotonic()
    program = begin(folder, "whole", layout)
    assert program.wait() == 0, program.told
    wanted = results(folder / "whole")
    whole = Whole(wanted, program.ready_at - began, time.monotonic() - program.ready_at)
    number = 0
    while kills > 0:
        number += 1
        cycle, out = Cycle(), f"broken-{number}"
        for _ in range(min(kills, 10)):
            if steps_of(folder / out) == STEPS:
                break
            killed = kill_one(begin(folder, out, layout), whole, folder / out, draw)
            if killed is None:
                break
            cycle.kills.append(killed)
            say(killed)
        kills -= len(cycle.kills)
        ended = folder / f"{out}-ended"
        if (folder / out).exists():
            shutil.copytree(folder / out, ended)
        for size, other in {2: layout, **{size: OTHERS[size] for size in others}}.items():
            program = begin(folder, out, other)
            assert program.wait() == 0, program.told
            if size == 2:
                found = results(folder / out)
                cycle.differs = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            else:
                cycle.losses[size] = abs(last_loss(folder / out) / last_loss(folder / "whole") - 1)
            shutil.rmtree(folder / out)
            if ended.exists():
                shutil.copytree(ended, folder / out)
        shutil.rmtree(folder / out, ignore_errors=True)
        yield cycle


def last_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"])


def say(kill: Kill) -> None:
    named, wrong = "named" if kill.is_named else "not named", "" if kill.is_right else "   WRONG"
    told = f"rank {kill.rank} {kill.doing} at step {kill.step}: exit {kill.code} after {kill.seconds:.1f} s, {named}"
    print(f"{told}{wrong}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", default=" ".join(TWO))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        total, bad = 0, 0
        for cycle in kill_runs(prepare(Path(place)), options.kills, options.seed, tuple(options.layout.split())):
            same = f"differs: {' '.join(cycle.differs)}" if cycle.differs else "the same, bit for bit"
            other = ", ".join(f"in {size}: {loss:.1e}" for size, loss in cycle.losses.items())
            print(f"    resumed in 2: {same}; last loss, relative, {other}", flush=True)
            total, bad = total + len(cycle.kills), bad + (not cycle.is_right)
        print(f"{total} kills, {bad} runs that are wrong")
        sys.exit(bool(bad))


if __name__ == "__main__":
    main()
