"""The page's routes. All stand below a link that is a key; `guard` stands before them.

The one idea: a request carries nothing but the link and what the page sends, so there is no session, no cookie, and
nothing that another site could make a browser send. Statistics come as a function: they are computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from pydantic import Field, ValidationError
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tunesmith.compare.guard import Guard
from tunesmith.compare.links import Links
from tunesmith.compare.shown import shown
from tunesmith.compare.turns import MOST_POINTS, Conflict, Refused, Sent, Turn, Turns
from tunesmith.core.files import strict_loads
from tunesmith.core.section import Section

KINDS = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}


class Undo(Section):
    """What the page sends to take a judgement back."""

    client: str = Field(min_length=8, max_length=64)
    judgement: str = Field(min_length=8, max_length=64)


class Page:
    """Answers requests.

    Args:
        statistics: gives a page and the content policy that it needs.
    """

    def __init__(self, turns: Turns, links: Links, statistics: Callable[[], tuple[str, str]]) -> None:
        self.turns, self.links, self.statistics = turns, links, statistics

    def app(self, origins: frozenset[str]) -> Starlette:
        """The application, for pages that come from `origins`, as in `http://127.0.0.1:8321`."""
        below = "/a/{name}/{token}/"
        return Starlette(
            routes=[
                Route(below, self.file, methods=["GET"]),
                Route(below + "{act}", self.act, methods=["POST"]),
                Route(below + "{file}", self.file, methods=["GET"]),
                Route("/s/{token}/", self.figures, methods=["GET"]),
            ],
            middleware=[Middleware(Guard, origins=origins)],
            exception_handlers={404: _nothing, 405: _nothing, DBAPIError: _later},  # type: ignore[dict-item]
        )

    async def file(self, request: Request) -> Response:
        """The page, its script and its style."""
        name = request.path_params.get("file", "page.html")
        if not self._is_own(request) or name not in KINDS:
            return _nothing()
        return Response(_file(name), media_type=KINDS[name])

    async def act(self, request: Request) -> Response:
        """next, judge or undo: JSON in, the next turn out."""
        name, act = request.path_params["name"], request.path_params["act"]
        if not self._is_own(request) or act not in ("next", "judge", "undo"):
            return _nothing()
        try:
            body = strict_loads((await request.body()).decode())
            return JSONResponse(await run_in_threadpool(self._turn, name, act, body))
        except Refused as refused:
            return JSONResponse({"error": refused.message}, 409 if isinstance(refused, Conflict) else 400)
        except ValidationError as error:
            first = error.errors()[0]
            return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 400)
        except ValueError:
            return JSONResponse({"error": "not JSON in UTF-8"}, 400)

    def _turn(self, name: str, act: str, body: Any) -> dict[str, Any]:
        if act == "judge":
            self.turns.judge(name, Sent.model_validate(body))
        elif act == "undo":
            undo = Undo.model_validate(body)
            self.turns.undo(name, undo.client, undo.judgement)
        # here, not in the loop that serves everyone: long answers take a while to be read as Markdown
        return _told(self.turns.next(name), self.turns.rubric)

    async def figures(self, request: Request) -> Response:
        """The statistics."""
        if not self.links.fits(request.path_params["token"], "s"):
            return _nothing()
        text, policy = await run_in_threadpool(self.statistics)
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})

    def _is_own(self, request: Request) -> bool:
        return self.links.fits(request.path_params["token"], "a", request.path_params["name"])


def _told(turn: Turn, rubric: tuple[str, ...]) -> dict[str, Any]:
    """A turn as the page needs it; who wrote an answer is not in it."""
    return {
        "item": turn.item,
        "messages": [
            {"role": one["role"], "shown": shown("\n\n".join(filter(None, (one["content"], one.get("context")))))}
            for one in turn.messages
        ],
        "answers": [shown(answer.text) for answer in turn.answers],
        "waiting": turn.waiting,
        "done": turn.done,
        "left": turn.left,
        "last": turn.last,
        "rubric": list(rubric),
        "most": MOST_POINTS,
    }


def _file(name: str) -> bytes:
    return resources.files("tunesmith.compare").joinpath(name).read_bytes()


def _nothing(*_: Any) -> Response:
    # the same for a wrong link and for a route that does not exist
    return PlainTextResponse("nothing here", 404)


def _later(*_: Any) -> Response:
    return PlainTextResponse("the database cannot be written just now", 503, headers={"Retry-After": "2"})
