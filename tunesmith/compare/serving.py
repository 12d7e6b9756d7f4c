"""Where the page is served: this machine alone, unless a key and an address are given; and until when.

The one idea: everything about the address is checked before anything is sampled or opened.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tunesmith.compare.links import VARIABLE
from tunesmith.core.errors import ConfigError, ResourceError, Stopped
from tunesmith.core.signals import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    from starlette.types import ASGIApp

CONNECTIONS = 512
BACKLOG = 128
HEADER_BYTES = 16 * 1024


@dataclass(frozen=True)
class Address:
    """Where to listen, and what the page is called from outside.

    Attributes:
        url: the page's address as people open it, where a proxy or a name stands before it.
    """

    host: str
    port: int
    url: str | None = None

    def check(self, key: str | None) -> None:
        """Raises ConfigError where this may not be served: beyond this machine without a key, or without a name."""
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/") or parts.query:
                raise ConfigError(f"{self.url!r} is not like https://label.example.org", where="--url")
        if is_loopback(self.host):
            return
        if key is None:
            hint = f'export {VARIABLE}="$(openssl rand -hex 32)", and put TLS before it; or leave out --host'
            raise ConfigError(f"{self.host} can be reached by others, and there is no key", where="--host", hint=hint)
        if self.url is None and self.host in ("0.0.0.0", "::", ""):
            told = f"{self.host} is every address of this machine; under which do people open the page?"
            raise ConfigError(told, where="--host", hint="add --url http://NAME:PORT")

    def open(self) -> socket.socket:
        """A bound socket. Raises ResourceError."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((self.host, self.port))
        except OSError as error:
            opened.close()
            told = f"cannot listen on {self.host}:{self.port}: {(error.strerror or str(error)).lower()}"
            raise ResourceError(told, where="--port", hint="--port 0 takes a free one") from error
        return opened

    def base(self, port: int) -> str:
        """What links begin with."""
        return self.url.rstrip("/") if self.url else f"http://{self._literal}:{port}"

    def origins(self, port: int) -> frozenset[str]:
        """Where the page may come from."""
        names = {self.base(port), f"http://{self._literal}:{port}"}
        if is_loopback(self.host):
            names |= {f"http://{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        return frozenset(names)

    @property
    def _literal(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(app: ASGIApp, opened: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until a signal; then finishes what is being answered and raises Stopped.

    Args:
        ready: called when a signal would already end it as it should.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,  # a link is a key
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=10,
    )
    server, caught = uvicorn.Server(config), []

    def leave(sig: int, frame: FrameType | None) -> None:
        caught.append(sig)
        server.should_exit = True

    server.handle_exit = leave  # type: ignore[method-assign]  # its own raises the signal again at the end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    opened.listen(BACKLOG)
    ready()
    server.run(sockets=[opened])
    code = TERMINATED if signal.SIGTERM in caught else INTERRUPTED
    raise Stopped("stopped; every judgement that was acknowledged is kept", exit_code=code)
