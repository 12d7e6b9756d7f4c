"""What stands before every request: known hosts, posts from the page itself, small bodies; and a strict policy after.

The one idea: it refuses before anything is routed, and it knows only what a request carries, never what a route means.
Whose link it is, is decided by `app`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES = 256 * 1024
BODY_SECONDS = 20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the link is the key
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware.

    Args:
        origins: where the page may come from, as in `http://127.0.0.1:8321`.
    """

    def __init__(self, app: ASGIApp, origins: frozenset[str]) -> None:
        self.app, self.origins = app, origins
        self.hosts = {origin.split("://")[1] for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a socket that nobody accepts is closed

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, guarded)
            return
        try:
            await self.app(scope, _bounded(receive), guarded)
        except _TooMuch:
            await PlainTextResponse("the body is too large", 413)(scope, receive, guarded)
        except TimeoutError:
            await PlainTextResponse("the body did not arrive in time", 408)(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason where a request is refused."""
        # the host first: a name of somebody else's that leads here (DNS rebinding) would make them the same origin
        if headers.getlist("host") != [headers.get("host", "")] or headers.get("host") not in self.hosts:
            return 421, "not a host of this page"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "only GET and POST"
        if headers.getlist("origin") != [headers.get("origin", "")] or headers.get("origin") not in self.origins:
            return 403, "not from this page"
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return 403, "not from this page"
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "JSON alone"
        return None


class _TooMuch(Exception):
    """A body over the limit."""


def _bounded(receive: Receive) -> Callable[[], asyncio.Future[Message]]:
    """The same messages; a body that is too large or too slow raises."""
    size, whole = 0, False

    async def bounded() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()  # waits until the other side goes away, for as long as that takes
        async with asyncio.timeout(BODY_SECONDS):
            message = await receive()
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > BODY_BYTES:
            raise _TooMuch
        return message

    return bounded  # type: ignore[return-value]
