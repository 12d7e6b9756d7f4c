"""What acts in a forward pass: which adapters, and where documents begin and end. Explicit, immutable, per context.

The one idea: both live in context variables that activation recomputation enters again (`checkpoint_contexts`), so
that a backward pass sees what its forward saw. Ports (`ports.py`) and attention (`attention.py`) ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from tunesmith.core.context import holding
from tunesmith.core.errors import AdapterError


@dataclass(frozen=True)
class Route:
    """Which adapters act, together: their deltas add up. No adapters is the base model.

    Use as `with route.enter(): model(...)`.

    Attributes:
        adapters: those that act, or, where rows differ, all that act on any of them.
        rows: the adapters of each row, where they differ: of each document of a packed batch, of each prompt, of each
            line of a padded batch. Made by `of_rows`.
    """

    adapters: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of_rows(cls, *rows: Sequence[str]) -> Route:
        """A route for each row of a batch: `Route.of_rows(("a",), (), ("b", "c"))`; a name alone is `(name,)`."""
        held = tuple((row,) if isinstance(row, str) else tuple(row) for row in rows)
        return cls(tuple(dict.fromkeys(name for row in held for name in row)), held)

    def of(self, row: int) -> tuple[str, ...]:
        """The adapters of one row."""
        return self.rows[row] if self.rows else self.adapters

    def select(self, rows: Sequence[int]) -> Route:
        """The route of some of its rows, in that order. One for all rows is itself."""
        return Route.of_rows(*(self.rows[row] for row in rows)) if self.rows else self

    def enter(self) -> AbstractContextManager[None]:
        """Makes this the route of every forward pass within."""
        return holding(_route, self)


BASE = Route()


@dataclass(frozen=True)
class Segments:
    """Documents, or parts of documents, that lie end to end in one row.

    Attributes:
        lengths: tokens of each; they add up to the length of the row.
        prefixes: for each, the number of an earlier one that it goes on from: all of its tokens see all of that one's.
            None where there is none, left out where no segment has any. What is gone on from goes on from nothing.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...] = ()

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """(first query, end of queries, first of their own keys, first key before these, end of those) of each.

        Own keys are as many as queries, and seen causally where attention is causal; those before are seen by all.
        """
        starts = list(accumulate(self.lengths, initial=0))
        found = []
        for number, start in enumerate(starts[:-1]):
            prefix = self.prefixes[number] if self.prefixes else None
            before = (0, 0) if prefix is None else (starts[prefix], starts[prefix + 1])
            found.append((start, starts[number + 1], start, *before))
        return tuple(found)

    def enter(self) -> AbstractContextManager[None]:
        """Makes attention of every forward pass within stay inside documents."""
        return holding(_segments, self)


@dataclass(frozen=True)
class Owners:
    """Which row each entry of an input is of, where entries were picked from many rows: states before the head.

    Attributes:
        rows: one number an entry.
    """

    rows: tuple[int, ...]

    def enter(self) -> AbstractContextManager[None]:
        """Makes ports within take entries for those rows'."""
        return holding(_owners, self)


@dataclass(frozen=True)
class Share:
    """One adapter's part in a forward pass.

    Attributes:
        adapter: its name.
        rows: the rows that it acts on; None for all. Where they lie in an input is told by `places.py`.
        count: how many rows there are.
    """

    adapter: str
    rows: tuple[int, ...] | None = None
    count: int = 0


_entered: list[ContextVar[Any]] = []


def entered(name: str) -> ContextVar[Any]:
    """A context variable, None by default, that a recomputation gets as its forward had it."""
    _entered.append(ContextVar(f"tunesmith_{name}", default=None))
    return _entered[-1]


_route: ContextVar[Route | None] = entered("route")
_segments: ContextVar[Segments | None] = entered("segments")
_owners: ContextVar[Owners | None] = entered("owners")


def current_route() -> Route | None:
    """The route that was entered, or None."""
    return _route.get()


def current_segments() -> Segments | None:
    """The documents of the row, or None where rows are ordinary."""
    return _segments.get()


def current_owners() -> Owners | None:
    """Whose the entries of an input are, or None where it holds whole rows."""
    return _owners.get()


class Attached:
    """The adapters that are on one model, shared by all of its ports.

    Attributes:
        names: in the order in which they were attached.
        merged: those whose deltas are in the weights now.
        restore: puts the weights back that merging replaced.
        heads: the prediction head (`heads.Head`) of each adapter that has one.
        soft: the soft tokens (`inserts.SoftTokens`) of each adapter that has some.
        keys: how many keys each adapter puts before those of a document, for adapters that do.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.heads: dict[str, Any] = {}
        self.soft: dict[str, Any] = {}
        self.keys: dict[str, int] = {}
        self.merged: tuple[str, ...] = ()
        self.restore: Callable[[], None] | None = None

    def shares(self) -> tuple[Share, ...]:
        """The adapters that act in this forward pass, from the route.

        Raises:
            AdapterError: no route was entered and several adapters are attached; the route names one that is not
                there; or it asks for something else than what is merged.
        """
        route = self.settled(_route.get())
        if not route.rows:
            return tuple(map(Share, route.adapters))
        # rows with the same adapters together, and these in their order: what one adds to may be what another added
        count = len(route.rows)
        groups = {names: tuple(row for row in range(count) if route.rows[row] == names) for names in route.rows}
        return tuple(Share(name, rows, count) for names, rows in groups.items() for name in names)

    def settled(self, route: Route | None) -> Route:
        """The route that acts: the one given, or of what is attached; empty where it is merged. Raises as `shares`."""
        if self.merged:
            self._check_merged(route)
            return BASE
        if route is None:
            if len(self.names) > 1:
                raise AdapterError(
                    f"several adapters are attached: {', '.join(self.names)}; say which act",
                    hint="run the model within `with route.enter():`, as in Route(adapters=('a',))",
                )
            return Route(tuple(self.names))
        for name in route.adapters:
            if name not in self.names:
                there = ", ".join(self.names) or "none"
                raise AdapterError(f"no adapter {name!r} is attached; there are: {there}")
        return route

    def _check_merged(self, route: Route | None) -> None:
        if route is None or (route.adapters == self.merged and not route.rows):
            return  # what nearly always is, and every map asks
        for names in set(route.rows or [route.adapters]):
            if set(names) != set(self.merged):
                raise AdapterError(
                    f"the weights hold {', '.join(self.merged)} (merged), but the route asks for "
                    f"{', '.join(names) or 'the base'}",
                    hint="unmerge first",
                )


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for `torch.utils.checkpoint`: the recomputation gets what the forward had entered."""
    return nullcontext(), _again([(variable, variable.get()) for variable in _entered])


@contextmanager
def _again(values: Sequence[tuple[ContextVar[Any], Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for variable, value in values:
            stack.enter_context(holding(variable, value))
        yield
