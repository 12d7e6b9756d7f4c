"""Programs in processes of their own that are forked from one which has imported what they need, as a sweep's are.

Starting Python and importing torch takes longer than most that a test makes a program do. What only a process that
starts from nothing can show (hash seeds, the order of imports, signals before `main`) has tests that start one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from contextlib import chdir
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

from tunesmith.run.trials import PRELOADED


class Warm:
    """One such process, with the names that subprocess.Popen gives them.

    Args:
        words: the program and its arguments: a file of Python, or `tunesmith`.
        environment: variables that are set besides those there are.

    Attributes:
        stderr: what it says, as text.
    """

    def __init__(self, *words: str, folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with chdir(Path(__file__).parent):  # it stands in no test's folder, where it would look left behind
            forkserver.ensure_running()
        said, told = context.Pipe(duplex=False)
        given = (words, str(folder or Path.cwd()), {**os.environ, **(environment or {})}, told)
        self.process = context.Process(target=_begin, args=given)
        self.process.start()
        atexit.register(self.kill)  # a test that fails leaves nothing to wait for
        told.close()
        self.stderr = os.fdopen(os.dup(said.fileno()))

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, that of a signal below 0. Raises TimeoutError."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(self.process)
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[None, str]:
        """All that it said, once it has ended, by itself or killed after so many seconds."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        said = self.stderr.read()
        self.wait()
        late.cancel()
        return None, said

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _begin(words: tuple[str, ...], folder: str, environment: dict[str, str], told: Connection) -> None:
    os.dup2(told.fileno(), 2)
    told.close()
    # whoever starts the tests in the background makes them and their children deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    if words[0] == "tunesmith":
        runpy.run_module("tunesmith", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
