"""The live display of a run on stderr: a bar in a terminal, a plain line now and then anywhere else.

It is an observer: it sees records and changes nothing. What is kept of a run is written in `log.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

PLAIN_EVERY_SECONDS = 15.0


class Observer(Protocol):
    """Sees each record of a run."""

    def __call__(self, record: dict[str, Any]) -> None: ...


@contextmanager
def training_progress(total_steps: int) -> Iterator[Observer]:
    """An observer that shows loss, tokens per second, time left and memory while the block runs."""
    shown = _bar if sys.stderr.isatty() else _lines
    with shown(total_steps) as observer:
        yield observer


@contextmanager
def _bar(total_steps: int) -> Iterator[Observer]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=120) as progress:
        task: Any = None

        def observe(record: dict[str, Any]) -> None:
            nonlocal task
            if task is None:
                # a resumed run starts here, so that its speed is not that of steps it did not make
                task = progress.add_task("tuning", total=total_steps, completed=record["step"] - 1, told="")
            progress.update(task, completed=record["step"], told=told(record))

        yield observe


@contextmanager
def _lines(total_steps: int) -> Iterator[Observer]:
    start, first, last = time.monotonic(), 0, -PLAIN_EVERY_SECONDS

    def observe(record: dict[str, Any]) -> None:
        nonlocal first, last
        step, now = record["step"], time.monotonic() - start
        first = first or step
        evaluated = any(name.startswith("eval_") for name in record)
        if now - last < PLAIN_EVERY_SECONDS and step != total_steps and not evaluated:
            return
        last = now
        left = now / (step - first + 1) * (total_steps - step)
        print(f"step {step}/{total_steps} {told(record)} {left:.0f} s left", file=sys.stderr, flush=True)

    yield observe


def told(record: dict[str, Any]) -> str:
    """A record in a few words."""
    parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:.0f} tokens/s"]
    parts.append(f"{record['peak_bytes'] / 1e9:.2f} GB")
    parts += [
        f"{name.removeprefix('eval_')} {value:.4g}"
        for name, value in record.items()
        if name.startswith("eval_") and isinstance(value, int | float) and not name.endswith("_seconds")
    ]
    return " ".join(parts)
