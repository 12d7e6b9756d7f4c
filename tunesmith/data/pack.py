"""Which rows make an update, and how they are cut into micro-batches.

Rows are taken in the order of the mixture until the step is full. The micro size only cuts a step that is
already made, so it never changes which rows are learnt from together; within it, rows that begin alike come
side by side, for a micro-batch computes a beginning that its rows share once. The place after a step is a cursor of
two integers, from which the same steps follow again; nothing else is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.data.order import Mixture


class Encoded(Protocol):
    """A row as tokens (`codec.Example`)."""

    @property
    def ids(self) -> Sequence[int]: ...


class Left(Protocol):
    """A row that is left out (`codec.Dropped`)."""

    @property
    def reason(self) -> str: ...


E = TypeVar("E", bound=Encoded)
_BEGINNING = 16  # tokens that rows have in common before they are brought together


@dataclass(frozen=True)
class Cursor:
    """A place in the data: the next row to look at is `position` of `epoch`, both from 0.

    `turn` updates have been made already with the rows that begin there, where rows serve several.
    """

    epoch: int = 0
    position: int = 0
    turn: int = 0


@dataclass(frozen=True)
class Step(Generic[E]):
    """The rows of one update.

    Attributes:
        number: which step of this stream, from 1.
        micro_batches: the rows, in order but for those that begin alike, cut into what is computed at once.
        cursor: the place after this step; a stream started there goes on with the next one.
        epoch: how many epochs of rows have been looked at, 1.5 in the middle of the second.
        dropped: rows that were looked at for this step and left out, by reason.
        spare: a row of the step for a process of several that has none; see `deal`.
    """

    number: int
    micro_batches: list[list[E]]
    cursor: Cursor
    epoch: float
    dropped: dict[str, int] = field(default_factory=dict)
    spare: list[E] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(len(rows) for rows in self.micro_batches)

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return sum(len(row.ids) for rows in self.micro_batches for row in rows)


@dataclass(frozen=True)
class Sizes:
    """How large steps and micro-batches are: in tokens or in rows, at most so many, at least one row.

    A micro size that is left out makes the whole step one micro-batch. Raises ConfigError unless exactly one
    family is used.
    """

    tokens_per_step: int | None = None
    rows_per_step: int | None = None
    micro_batch_tokens: int | None = None
    micro_batch_rows: int | None = None

    def __post_init__(self) -> None:
        tokens, rows = (self.tokens_per_step, self.micro_batch_tokens), (self.rows_per_step, self.micro_batch_rows)
        if (tokens[0] is None) == (rows[0] is None) or (tokens if tokens[0] is None else rows) != (None, None):
            raise ConfigError(
                "sizes are either tokens (tokens_per_step, micro_batch_tokens) or rows (rows_per_step, "
                "micro_batch_rows)",
                where="train",
            )
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it is at least 1", where="train")

    def step_takes(self, rows: int, tokens: int) -> bool:
        """Whether a step may hold so many rows of so many tokens in all."""
        return _fits(rows, tokens, self.rows_per_step, self.tokens_per_step)

    def micro_takes(self, rows: int, tokens: int) -> bool:
        """Whether a micro-batch may hold so many rows of so many tokens in all."""
        return _fits(rows, tokens, self.micro_batch_rows, self.micro_batch_tokens)


def _fits(rows: int, tokens: int, most_rows: int | None, most_tokens: int | None) -> bool:
    return rows <= 1 or ((most_rows is None or rows <= most_rows) and (most_tokens is None or tokens <= most_tokens))


class StepStream(Generic[E]):
    """The steps of a mixture, from a cursor on, one at a time.

    Args:
        mixture: the order of the rows.
        example: (source, row) -> the row as tokens, or why it is left out.
        sizes: of steps and micro-batches.
        start: where to begin.
        epochs: where to end: the last step then holds what is left. None goes on for ever.

    Iterating raises DataError when a whole epoch holds no row that can be learnt from.
    """

    def __init__(
        self,
        mixture: Mixture,
        example: Callable[[int, int], E | Left],
        sizes: Sizes,
        *,
        start: Cursor | None = None,
        epochs: int | None = None,
    ) -> None:
        self.mixture, self.example, self.sizes = mixture, example, sizes
        self.start, self.epochs = start or Cursor(), epochs

    def __iter__(self) -> Iterator[Step[E]]:
        rows: list[E] = []
        tokens, number, cursor = 0, 0, self.start
        dropped: dict[str, int] = {}
        since: dict[str, int] = {}  # left out behind the cursor: they are met again by a stream that starts there
        for following, row in self._rows():
            if isinstance(row, str):
                since[row] = since.get(row, 0) + 1
                continue
            if not self.sizes.step_takes(len(rows) + 1, tokens + len(row.ids)):
                number += 1
                yield self._step(number, rows, cursor, dropped)
                rows, tokens, dropped = [], 0, {}
            rows.append(row)
            tokens += len(row.ids)
            dropped, since, cursor = _sum(dropped, since), {}, following
        if rows:
            yield self._step(number + 1, rows, Cursor(self.epochs or 0, 0), _sum(dropped, since))

    def _rows(self) -> Iterator[tuple[Cursor, E | str]]:
        """Each row, or the reason why it is left out, with the place behind it."""
        size = len(self.mixture)
        epoch, position, idle_rows = self.start.epoch, self.start.position, 0
        while self.epochs is None or epoch < self.epochs:
            row = self.example(*self.mixture.pick(epoch, position))
            epoch, position = (epoch, position + 1) if position + 1 < size else (epoch + 1, 0)
            reason = getattr(row, "reason", None)
            idle_rows = idle_rows + 1 if reason else 0
            if idle_rows >= size:
                raise DataError(f"0 of {size} rows can be learnt from; the last was left out because: {reason}")
            yield Cursor(epoch, position), reason or row  # type: ignore[misc]

    def _step(self, number: int, rows: list[E], cursor: Cursor, dropped: dict[str, int]) -> Step[E]:
        epoch = cursor.epoch + cursor.position / len(self.mixture)
        return Step(number, cut(rows, self.sizes), cursor, epoch, dropped)


def cut(rows: Sequence[E], sizes: Sizes) -> list[list[E]]:
    """Micro-batches, as few as the sizes allow, and as even in tokens as so few can be; none for no rows.

    The largest is the peak. Those that begin alike are side by side.
    """
    ordered = _side_by_side(rows)
    found, most = _in_order(ordered, sizes), sizes.micro_batch_tokens or 0
    low = max(1, sum(len(row.ids) for row in rows) // max(1, len(found)))
    while low < most:  # the smallest size with which there are no more of them
        middle = (low + most) // 2
        other = _in_order(ordered, replace(sizes, micro_batch_tokens=middle))
        if len(other) == len(found):
            found, most = other, middle
        else:
            low = middle + 1
    return found


def cut_into(rows: Sequence[E], count: int) -> list[list[E]]:
    """At most `count` micro-batches, as even in tokens as they can be; none for no rows."""
    ordered = _side_by_side(rows)
    low, high = 1, max(1, sum(len(row.ids) for row in rows))
    while low < high:  # the smallest size with which there are no more of them
        middle = (low + high) // 2
        if len(_in_order(ordered, Sizes(tokens_per_step=high, micro_batch_tokens=middle))) <= count:
            high = middle
        else:
            low = middle + 1
    return _in_order(ordered, Sizes(tokens_per_step=high, micro_batch_tokens=high))


def _in_order(rows: Sequence[E], sizes: Sizes) -> list[list[E]]:
    """Rows one after another, a new micro-batch where one is full."""
    found: list[list[E]] = []
    tokens = 0
    for row in rows:
        if not found or not sizes.micro_takes(len(found[-1]) + 1, tokens + len(row.ids)):
            found.append([])
            tokens = 0
        found[-1].append(row)
        tokens += len(row.ids)
    return found


def _side_by_side(rows: Sequence[E]) -> list[E]:
    """Rows in order, but those that begin alike together where the first of them is, and sorted by what they hold."""
    alike: dict[tuple[int, ...], list[E]] = {}
    for row in rows:
        alike.setdefault(tuple(row.ids[:_BEGINNING]), []).append(row)
    return [row for group in alike.values() for row in sorted(group, key=lambda row: tuple(row.ids))]


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {reason: one.get(reason, 0) + other.get(reason, 0) for reason in {**one, **other}}


@dataclass(frozen=True)
class Totals:
    """What a number of epochs comes to: updates, kept rows and their tokens, rows left out by reason."""

    steps: int
    rows: int
    tokens: int
    dropped: dict[str, int]


def count_steps(
    mixture: Mixture,
    example: Callable[[int, int], E | Left],
    sizes: Sizes,
    epochs: int,
    progress: Callable[[int, int], None] | None = None,
) -> Totals:
    """Walks the steps of so many epochs and counts them exactly, holding one step at a time.

    Args:
        progress: called with (rows looked at, rows in all) after each step.

    Raises: DataError where nothing can be learnt from.
    """
    steps = rows = tokens = 0
    dropped: dict[str, int] = {}
    for step in StepStream(mixture, example, sizes, epochs=epochs):
        steps, rows, tokens = step.number, rows + step.rows, tokens + step.tokens
        dropped = _sum(dropped, step.dropped)
        if progress is not None:
            progress(round(step.epoch * len(mixture)), len(mixture) * epochs)
    return Totals(steps, rows, tokens, dropped)
