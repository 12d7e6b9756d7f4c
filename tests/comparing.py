"""A comparison that is served by the real program, and people who judge it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.compare.store import Store, Written
from tunesmith.compare.tables import connect

ROOT = Path(__file__).parents[1]


def filled(folder: Path, prompts: int, answers: int = 2, url: str | None = None) -> Store:
    """A comparison of systems A, B, ... with so many prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(connect(url or f"sqlite:///{folder / 'compare.sqlite'}"))
    numbers = store.add_prompts([[{"role": "user", "content": f"Question {place}"}] for place in range(prompts)])
    systems = "ABCDEFGH"[:answers]
    store.add_answers([Written(one, name, 1, f"Answer of {name} to {one}") for one in numbers for name in systems])
    return store


class Served:
    """The page's process.

    Attributes:
        links: of each annotator.
        statistics: the link of the figures.
    """

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.command = [sys.executable, "-m", "tunesmith", "compare", str(folder), "--json", *options]
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self.environment = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
        self.start()

    def start(self) -> None:
        """Starts it and waits for its links."""
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        text = ""
        while not text.endswith("}\n") or text.count("{") != text.count("}"):
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(self.process.communicate()[1])
            text += line
        told = json.loads(text)
        self.links, self.statistics = told["annotators"], told["statistics"]

    def kill(self) -> None:
        """As a loss of power."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """As Ctrl-C; gives the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)
        return self.process.returncode


@contextmanager
def served(folder: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """The page, on a free port, until the block ends."""
    one = Served(folder, *(options if "--port" in options else (*options, "--port", "0")), environment=environment)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.kill()


def ask(
    url: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, str]:
    """Status and text of a request as the page makes it; headers replace the page's own."""
    origin = "/".join(url.split("/")[:3])
    sent = {"Origin": origin, "Content-Type": "application/json", **(headers or {})}
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {name: value for name, value in sent.items() if value}
    request = urllib.request.Request(url, data, sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def judgement(item: int, ranks: list[int] | None = None, kind: str = "ranked", **more: Any) -> dict[str, Any]:
    """A judgement as the page sends it."""
    return {"client": uuid.uuid4().hex, "item": item, "kind": kind, "ranks": ranks, "seconds": 1.5, **more}


def persist(url: str, body: Any, until: float) -> dict[str, Any]:
    """Sends until it is acknowledged, as the page does. Raises TimeoutError."""
    while time.monotonic() < until:
        try:
            status, text = ask(url, body)
        except OSError:
            status = 503
        if status == 200:
            return dict(json.loads(text))
        assert status in (503, 408, 429), (status, text)
        time.sleep(0.05)
    raise TimeoutError(url)
