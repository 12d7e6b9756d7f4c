"""Finds out that a peer process is gone, hangs, or has failed, and ends this one in time, naming rank and reason.

The one idea: every process counts in the store of torch.distributed, from a thread of its own; a count that stands
still is a process that is gone. Collectives need no short timeouts then: a peer that only works long goes on counting.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import Any

from tunesmith.core.errors import PeerError

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # a peer that has not counted for so long is gone
LEAVING_SECONDS = 6.0  # for a process that knows of the failure to end by itself
FAILED, DONE = "failed", "done"


class Watch:
    """One process's eye on the others.

    Args:
        store: of the process group; a connection of its own.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._ended = threading.Event()
        self._count = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """From here on; every process has counted once."""
        self._thread.start()

    def tell(self, reason: str) -> None:
        """Tells the others that this process has failed; the first one to say so is heard."""
        with suppress(Exception):  # the store may be gone with its process
            self.store.compare_set(FAILED, "", f"rank {self.rank}: {reason}")

    def close(self) -> None:
        """This process leaves, and its silence is none."""
        self._ended.set()
        self._thread.join(2 * BEAT_SECONDS)
        with suppress(Exception):
            self.store.set(_beat_of(self.rank), DONE)

    def reason(self, wait_seconds: float) -> str:
        """What the others' failure is, as far as it becomes known in time."""
        until = time.monotonic() + wait_seconds
        while time.monotonic() < until:
            with suppress(Exception):
                found = self._failure(silent_seconds=5 * BEAT_SECONDS)
                if found:
                    return found
            time.sleep(BEAT_SECONDS / 4)
        return "a peer process is gone"

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._beat()
                found = self._failure(SILENT_SECONDS)
            except Exception:  # any error of the connection
                found = "rank 0: its store does not answer, it or its machine is gone"
            if found:
                break
        else:
            return
        # the main thread may know already: then its own error is the better one
        if not self._ended.wait(LEAVING_SECONDS):
            with suppress(OSError):
                os.write(2, f"error: {PeerError.told(found)}\nhint: {PeerError.HINT}\n".encode())
            os._exit(PeerError.exit_code)

    def _beat(self) -> None:
        self._count += 1
        self.store.set(_beat_of(self.rank), str(self._count))

    def _failure(self, silent_seconds: float) -> str:
        """What a peer has said of itself, or that it says nothing; empty while all is well."""
        if self.store.check([FAILED]):
            return str(self.store.get(FAILED).decode())
        now = time.monotonic()
        for peer in range(self.size):
            if peer == self.rank or not self.store.check([_beat_of(peer)]):
                continue
            count = self.store.get(_beat_of(peer)).decode()
            if self._seen.get(peer, ("", 0.0))[0] != count:
                self._seen[peer] = (count, now)
            elif count != DONE and now - self._seen[peer][1] > silent_seconds:
                return f"rank {peer}: gone, or not answering for {silent_seconds:.0f} s"
        return ""


def _beat_of(rank: int) -> str:
    return f"beat/{rank}"
