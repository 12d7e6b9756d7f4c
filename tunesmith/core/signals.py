"""SIGTERM before there is a run: the program leaves with 75 at once, because there is nothing to save yet.

The one idea: this needs the standard library alone, so that it is in place before anything else is imported. A run
has its own ways: `run.stopping` around the training, `train.stop` within it.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

TERMINATED, INTERRUPTED = 75, 130  # exit codes


def leave_when_terminated() -> None:
    """From here on SIGTERM ends the process with 75 and one line. Call it in the main thread."""
    signal.signal(signal.SIGTERM, _leave)


def set_back(handler: object) -> None:
    """Gives SIGTERM the handler that it had before a run; after one, leaving at once would say what is not true."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is _leave else handler)  # type: ignore[arg-type]


def _leave(number: int, frame: FrameType | None) -> None:
    # not an exception: the import that it interrupts may take it for its own
    with suppress(OSError):
        os.write(2, b"error: stopped before the run began; nothing was changed\n")
    os._exit(TERMINATED)
