"""Signals outside the training loop: before and after it, stopping is leaving, because what is done is on the disk.

The loop has its own way (`train.stop`): it finishes the step and saves. Until there is a run to speak of, signals are
`core.signals`'s.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tunesmith.core.errors import Stopped
from tunesmith.core.signals import INTERRUPTED, TERMINATED, set_back
from tunesmith.run.folder import RunFolder


class _Terminated(BaseException):
    """SIGTERM, as something that no `except Exception` on the way takes for an error."""


@contextmanager
def stoppable(folder: RunFolder) -> Iterator[None]:
    """SIGTERM and interrupts in the block raise Stopped with the exit code of each."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if is_main else None
    try:
        yield
    except (_Terminated, KeyboardInterrupt) as error:
        code = TERMINATED if isinstance(error, _Terminated) else INTERRUPTED
        hint = "go on with --resume" if folder.exists else ""
        raise Stopped("stopped outside of training", where=str(folder.path), hint=hint, exit_code=code) from error
    finally:
        if is_main:
            set_back(before)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process
    raise _Terminated
