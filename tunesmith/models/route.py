"""What acts in a forward pass: which adapters, and where documents begin and end. Explicit, immutable, per context.

The one idea: both live in context variables that activation recomputation enters again (`checkpoint_contexts`), so
that a backward pass sees what its forward saw. Ports (`ports.py`) and attention (`attention.py`) ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import AdapterError


@dataclass(frozen=True)
class Route:
    """Which adapters act, together: their deltas add up. No adapters is the base model.

    Use as `with route.enter(): model(...)`.
    """

    adapters: tuple[str, ...] = ()

    def enter(self) -> AbstractContextManager[None]:
        """Makes this the route of every forward pass within."""
        return _holding(_route, self)


BASE = Route()


@dataclass(frozen=True)
class Segments:
    """Documents that lie end to end in one row.

    Attributes:
        lengths: tokens of each; they add up to the length of the row.
    """

    lengths: tuple[int, ...]

    def enter(self) -> AbstractContextManager[None]:
        """Makes attention of every forward pass within stay inside documents."""
        return _holding(_segments, self)


@dataclass(frozen=True)
class Share:
    """One adapter's part in a forward pass.

    Today a share is all of the input. An adapter per document becomes a share with a token range here, found from
    the route and the segments; ports ask for shares already.
    """

    adapter: str


_route: ContextVar[Route | None] = ContextVar("tunesmith_route", default=None)
_segments: ContextVar[Segments | None] = ContextVar("tunesmith_segments", default=None)


def current_route() -> Route | None:
    """The route that was entered, or None."""
    return _route.get()


def current_segments() -> Segments | None:
    """The documents of the row, or None where rows are ordinary."""
    return _segments.get()


class Attached:
    """The adapters that are on one model, shared by all of its ports.

    Attributes:
        names: in the order in which they were attached.
        merged: those whose deltas are in the weights now.
        restore: puts the weights back that merging replaced.
        heads: the prediction head (`heads.Head`) of each adapter that has one.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.heads: dict[str, Any] = {}
        self.merged: tuple[str, ...] = ()
        self.restore: Callable[[], None] | None = None

    def shares(self) -> tuple[Share, ...]:
        """The adapters that act in this forward pass, from the route.

        Raises:
            AdapterError: no route was entered and several adapters are attached; the route names one that is not
                there; or it asks for something else than what is merged.
        """
        route = _route.get()
        if self.merged:
            return self._merged_shares(route)
        if route is None:
            if len(self.names) > 1:
                raise AdapterError(
                    f"several adapters are attached: {', '.join(self.names)}; say which act",
                    hint="run the model within `with route.enter():`, as in Route(adapters=('a',))",
                )
            return tuple(map(Share, self.names))
        for name in route.adapters:
            if name not in self.names:
                there = ", ".join(self.names) or "none"
                raise AdapterError(f"no adapter {name!r} is attached; there are: {there}")
        return tuple(map(Share, route.adapters))

    def _merged_shares(self, route: Route | None) -> tuple[Share, ...]:
        if route is not None and set(route.adapters) != set(self.merged):
            wanted = ", ".join(route.adapters) or "the base"
            raise AdapterError(
                f"the weights hold {', '.join(self.merged)} (merged), but the route asks for {wanted}",
                hint="unmerge first",
            )
        return ()


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for `torch.utils.checkpoint`: the recomputation gets the route and segments of the forward."""
    return nullcontext(), _both(_route.get(), _segments.get())


@contextmanager
def _both(route: Route | None, segments: Segments | None) -> Iterator[None]:
    with _holding(_route, route), _holding(_segments, segments):
        yield


@contextmanager
def _holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
