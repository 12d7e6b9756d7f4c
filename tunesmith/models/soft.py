"""Room for soft tokens: documents made longer where trained vectors go, and the way back to the caller's tokens.

The one idea: whoever hands in documents never notices. A token's state is, on the way back, the one from which what
follows the token is predicted, also where soft tokens stand between the two. The embedding's port writes the vectors
into the room (`ports.EmbeddingPort`); keys that precede a document (`prefixes.py`) only move its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.models.folder import position_limit
from tunesmith.models.route import Attached, Route, current_route, entered, holding

# id in the room; its embedding is computed and written over
PLACEHOLDER = 0


@dataclass(frozen=True)
class Holes:
    """Where vectors go in the ids of a forward pass.

    Attributes:
        shape: of the ids that have room; ids of another shape (tokens that are written later) are left alone.
        puts: for each adapter, int64 [n] places in the flattened ids and int64 [n] numbers of its vectors.
    """

    shape: tuple[int, int]
    puts: tuple[tuple[str, Tensor, Tensor], ...] = ()

    def enter(self) -> AbstractContextManager[None]:
        """Makes the embedding's port write vectors there in every forward pass within."""
        return holding(_holes, self)


_holes: ContextVar[Holes | None] = entered("holes")


def current_holes() -> Holes | None:
    """The room in the ids of this forward pass, or None where nobody thought of any."""
    return _holes.get()


@dataclass(frozen=True)
class Some:
    """Some vectors of an adapter: `count` of them, from its `first`."""

    adapter: str
    first: int
    count: int


@dataclass(frozen=True)
class Room:
    """What a route puts before and into one document.

    Attributes:
        prefix, infix: soft tokens before it and inside it, in the order of the route.
        keys: keys that precede its own in attention; its positions begin there.
    """

    prefix: tuple[Some, ...] = ()
    infix: tuple[Some, ...] = ()
    keys: int = 0

    @property
    def before(self) -> int:
        """Soft tokens before the document."""
        return sum(some.count for some in self.prefix)

    @property
    def inside(self) -> int:
        """Soft tokens inside the document."""
        return sum(some.count for some in self.infix)


@dataclass(frozen=True)
class Layout:
    """Documents with room in them, as they lie end to end.

    Attributes:
        rooms: of each document.
        old: its tokens.
        splits: those before its infix.
    """

    rooms: tuple[Room, ...]
    old: tuple[int, ...]
    splits: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document with room."""
        return tuple(old + room.before + room.inside for old, room in zip(self.old, self.rooms, strict=True))

    @property
    def longest(self) -> int:
        """The most positions that a document takes, with the keys that precede it."""
        return max((room.keys + n for room, n in zip(self.rooms, self.lengths, strict=True)), default=0)

    def places(self, device: torch.device) -> Tensor:
        """Where each token lies now: int64 [tokens]."""
        found = []
        for start, room, split, old in zip(_starts(self.lengths), self.rooms, self.splits, self.old, strict=True):
            head = start + room.before
            tail = head + room.inside
            found += [(head, head + split), (tail + split, tail + old)]
        return _ranges(found, device)

    def sources(self, device: torch.device) -> Tensor:
        """Where the state lies from which what follows each token is predicted: int64 [tokens]."""
        last = [start + split - 1 for start, split in zip(_starts(self.old), self.splits, strict=True) if split]
        more = [room.inside for room, split in zip(self.rooms, self.splits, strict=True) if split]
        moved = torch.tensor(more, dtype=torch.int64, device=device)
        return self.places(device).index_add(0, torch.tensor(last, dtype=torch.int64, device=device), moved)

    def spread(self, values: Tensor) -> Tensor:
        """Ids, or what goes with them, with placeholders in the room: [tokens] to [tokens with room]."""
        return values.new_full((sum(self.lengths),), PLACEHOLDER).index_put((self.places(values.device),), values)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [tokens with room]."""
        return _ranges([(room.keys, room.keys + n) for room, n in zip(self.rooms, self.lengths, strict=True)], device)

    def holes(self, shape: tuple[int, int], starts: Iterable[int], device: torch.device) -> Holes:
        """The room in ids of a shape; each document begins at one of `starts` in its flattened form."""
        found: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        for start, room, split in zip(starts, self.rooms, self.splits, strict=True):
            at = start
            for tokens, group in ((0, room.prefix), (split, room.infix)):
                at += tokens
                for some in group:
                    places, vectors = found.setdefault(some.adapter, ([], []))
                    places.append((at, at + some.count))
                    vectors.append((some.first, some.first + some.count))
                    at += some.count
        puts = tuple((name, _ranges(at, device), _ranges(of, device)) for name, (at, of) in found.items())
        return Holes(shape, puts)

    def packed(self, device: torch.device) -> Holes:
        """The room in one row that holds all documents."""
        return self.holes((1, sum(self.lengths)), _starts(self.lengths), device)

    def padded(self, device: torch.device) -> Holes:
        """The room in a row for each document, padded behind it."""
        rows, width = len(self.lengths), max(self.lengths, default=0)
        return self.holes((rows, width), range(0, rows * width, width or 1), device)


def layout(
    model: nn.Module, route: Route | None, lengths: Sequence[int], splits: Callable[[], Sequence[int]] | None = None
) -> Layout | None:
    """The room that a route wants in documents; None where it wants none.

    Args:
        route: None for the one that was entered, or what is attached.
        splits: answers how many tokens of each document come before its infix; by default all of them.
    """
    attached = model.__dict__.get("_tunesmith_attached")
    if attached is None or not (attached.soft or attached.keys):
        return None
    acting = attached.settled(current_route() if route is None else route)
    rooms = tuple(_room(attached, acting.of(row)) for row in range(len(lengths)))
    if not any(room.before or room.inside or room.keys for room in rooms):
        return None
    where = splits() if splits is not None and any(room.inside for room in rooms) else lengths
    return Layout(rooms, tuple(lengths), tuple(where))


@contextmanager
def roomy(model: nn.Module, route: Route | None, texts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Texts (ids, int64 [tokens] each) with the room that a route wants; within, vectors are written into it.

    For callers that give a model one row a text, padded behind it.
    """
    room = layout(model, route, [len(text) for text in texts])
    if room is None or not texts:
        yield list(texts)
        return
    wide = room.spread(torch.cat(list(texts)))
    with room.padded(wide.device).enter():
        yield list(wide.split(list(room.lengths)))


def check_positions(model: Any, found: Layout) -> None:
    """Raises ConfigError where a document and what stands before it exceed the model's table of positions."""
    limit = position_limit(model.config.to_dict())
    if limit is not None and found.longest > limit:
        raise ConfigError(
            f"a row and the soft tokens that go with it take {found.longest} positions; the model has {limit}",
            where="data.max_length",
            hint="shorter rows, or fewer soft tokens",
        )


def _room(attached: Attached, names: Sequence[str]) -> Room:
    soft = [(name, attached.soft[name]) for name in names if name in attached.soft]
    return Room(
        tuple(Some(name, 0, tokens.before) for name, tokens in soft if tokens.before),
        tuple(Some(name, tokens.before, tokens.inside) for name, tokens in soft if tokens.inside),
        sum(attached.keys.get(name, 0) for name in names),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))[:-1]


def _ranges(pairs: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    parts = [torch.arange(first, end, device=device) for first, end in pairs if end > first]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)
