"""Steps: each row once an epoch, micro sizes change nothing but the cuts, any cursor resumes exactly."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Cursor, Sizes, Step, StepStream, count_steps


@dataclass(frozen=True)
class Row:
    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Gone:
    reason: str


def example(source: int, row: int) -> Row | Gone:
    """Rows of 1 to 13 tokens; every seventh is left out for one of two reasons."""
    if row % 7 == 3:
        return Gone("too long" if row % 2 else "empty")
    return Row(row, (0,) * (1 + row * 5 % 13))


def whole(source: int, row: int) -> Row | Gone:
    return Row(row, (0,) * (1 + row * 5 % 13))


def steps(size: int, sizes: Sizes, start: Cursor | None = None, epochs: int = 2, get=example) -> list[Step[Row]]:
    return list(StepStream(Mixture([size], seed=2), get, sizes, start=start, epochs=epochs))


def rows_of(step: Step[Row]) -> list[int]:
    return [row.index for batch in step.micro_batches for row in batch]


sizes = st.one_of(
    st.builds(Sizes, tokens_per_step=st.integers(1, 60), micro_batch_tokens=st.none() | st.integers(1, 60)),
    st.builds(Sizes, rows_per_step=st.integers(1, 9), micro_batch_rows=st.none() | st.integers(1, 9)),
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), sizes=sizes, epochs=st.integers(1, 3))
def test_epochs_consume_every_row_exactly_once_each(n: int, sizes: Sizes, epochs: int) -> None:
    """Kills: losing the row that did not fit, dropping the last partial step, repeating rows to fill it."""
    consumed = Counter(index for step in steps(n, sizes, epochs=epochs, get=whole) for index in rows_of(step))
    assert consumed == Counter({index: epochs for index in range(n)})


@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 30), sizes=sizes)
def test_dropped_and_kept_rows_are_the_total(n: int, sizes: Sizes) -> None:
    """Kills: counting a dropped row twice, or not at all, where two steps meet."""
    made = steps(n, sizes)
    assert sum(step.rows + sum(step.dropped.values()) for step in made) == 2 * n
    assert {name for step in made for name in step.dropped} <= {"too long", "empty"}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 30), sizes=sizes, at=st.integers(0, 100))
def test_a_stream_from_any_cursor_goes_on_exactly(n: int, sizes: Sizes, at: int) -> None:
    """Kills: a cursor behind the row that did not fit; counting what was dropped before the cursor again."""
    made = steps(n, sizes)
    at %= len(made)
    again = steps(n, sizes, start=made[at].cursor)
    assert [(s.micro_batches, s.cursor, s.epoch, s.dropped) for s in again] == [
        (s.micro_batches, s.cursor, s.epoch, s.dropped) for s in made[at + 1 :]
    ]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), tokens=st.integers(1, 60), micro=st.integers(1, 60))
def test_micro_size_never_changes_which_rows_make_a_step(n: int, tokens: int, micro: int) -> None:
    """Kills: closing a step where a micro-batch is full."""
    cut = steps(n, Sizes(tokens_per_step=tokens, micro_batch_tokens=micro))
    uncut = steps(n, Sizes(tokens_per_step=tokens))
    assert [rows_of(step) for step in cut] == [rows_of(step) for step in uncut]
    assert [step.cursor for step in cut] == [step.cursor for step in uncut]
    assert all(len(step.micro_batches) == 1 for step in uncut)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), tokens=st.integers(1, 60), micro=st.integers(1, 60))
def test_sizes_are_kept_unless_one_row_alone_is_larger(n: int, tokens: int, micro: int) -> None:
    """Kills: `<` for `<=`, and an empty step or micro-batch before a row that is too large."""
    made = steps(n, Sizes(tokens_per_step=tokens, micro_batch_tokens=micro))
    for step, following in zip(made, [*made[1:], None], strict=True):
        assert step.tokens <= tokens or step.rows == 1
        if following:  # the step was full: the next row did not fit
            assert step.tokens + len(following.micro_batches[0][0].ids) > tokens
        for batch in step.micro_batches:
            assert batch
            assert sum(len(row.ids) for row in batch) <= micro or len(batch) == 1


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=9), micro=st.integers(1, 40))
def test_micro_batches_are_as_few_and_then_as_even_as_can_be(lengths: list[int], micro: int) -> None:
    """Kills: filling one after another, which leaves a small rest and a larger peak. Held against all possible cuts."""
    rows = [Row(number, tuple(range(length))) for number, length in enumerate(sorted(lengths))]
    mixture, got = Mixture([len(rows)], seed=2), lambda source, row: rows[row]
    (step,) = StepStream(
        mixture, got, Sizes(rows_per_step=None, tokens_per_step=999, micro_batch_tokens=micro), epochs=1
    )
    ordered = [len(row.ids) for batch in step.micro_batches for row in batch]
    possible = []
    for places in range(2 ** (len(ordered) - 1)):
        cut = [[ordered[0]]]
        for at, length in enumerate(ordered[1:]):
            if places >> at & 1:
                cut.append([])
            cut[-1].append(length)
        if all(len(part) == 1 or sum(part) <= micro for part in cut):
            possible.append((len(cut), max(map(sum, cut))))
    assert (len(step.micro_batches), max(sum(len(r.ids) for r in b) for b in step.micro_batches)) == min(possible)


def test_rows_per_step_gives_full_steps_across_epochs_and_a_last_partial_one() -> None:
    made = steps(5, Sizes(rows_per_step=3, micro_batch_rows=2), epochs=2, get=whole)
    assert [[len(batch) for batch in step.micro_batches] for step in made] == [[2, 1], [2, 1], [2, 1], [1]]
    assert [step.number for step in made] == [1, 2, 3, 4]
    assert [step.epoch for step in made] == [0.6, 1.2, 1.8, 2.0]
    assert made[-1].cursor == Cursor(2, 0)


def test_steps_go_on_for_ever_without_a_number_of_epochs() -> None:
    stream = iter(StepStream(Mixture([3]), whole, Sizes(rows_per_step=2)))
    assert [next(stream).number for _ in range(10)] == list(range(1, 11))


def test_an_epoch_without_a_trainable_row_is_an_error_and_not_an_endless_loop() -> None:
    """Kills: looking for a kept row for ever."""
    stream = StepStream(Mixture([4]), lambda source, row: Gone("longer than max_length"), Sizes(rows_per_step=1))
    with pytest.raises(DataError, match=r"0 of 4 rows.*longer than max_length"):
        next(iter(stream))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 30), sizes=sizes, epochs=st.integers(1, 3))
def test_counted_steps_are_the_steps_of_the_stream(n: int, sizes: Sizes, epochs: int) -> None:
    made = steps(n, sizes, epochs=epochs)
    seen: list[tuple[int, int]] = []
    totals = count_steps(Mixture([n], seed=2), example, sizes, epochs, lambda *amounts: seen.append(amounts))
    assert (totals.steps, totals.rows, totals.tokens) == (
        len(made), sum(step.rows for step in made), sum(step.tokens for step in made)
    )  # fmt: skip
    assert totals.rows + sum(totals.dropped.values()) == n * epochs
    assert seen[-1] == (n * epochs, n * epochs)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"tokens_per_step": 8, "rows_per_step": 2},
        {"tokens_per_step": 8, "micro_batch_rows": 2},
        {"rows_per_step": 8, "micro_batch_tokens": 2},
        {"tokens_per_step": 0},
        {"rows_per_step": 4, "micro_batch_rows": 0},
    ],
)
def test_sizes_are_of_exactly_one_family_and_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Sizes(**wrong)


def test_a_stream_over_millions_of_rows_holds_only_one_step() -> None:
    """Kills: a list or a shuffled index of the rows."""
    mixture = Mixture([30_000_000], seed=1)
    tracemalloc.start()
    stream = iter(StepStream(mixture, whole, Sizes(tokens_per_step=400)))
    for _ in range(20):
        next(stream)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1_000_000
