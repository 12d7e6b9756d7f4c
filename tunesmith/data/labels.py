"""Labelled rows for a prediction head: texts framed as the tokenizer's authors frame them, labels as numbers.

The one idea: the list of labels is the training data's, sorted, so that it is the same on every machine; a label that
is not in it is an error that names its row. The same rows for a model that writes are in `encode.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tunesmith.core.errors import DataError
from tunesmith.core.problem import CLASSES, Problem, ProblemKind
from tunesmith.data.codec import Codec
from tunesmith.data.encode import Dropped, Example
from tunesmith.data.rows import Labelled, Row, Tagged

if TYPE_CHECKING:
    from tokenizers import Encoding

EMPTY = "no token to read"
NO_ROOM = "max_length has no room for a text"


def find_labels(rows: Iterable[Row], kind: ProblemKind, seed: int = 0) -> Problem:
    """The problem that training rows pose: their labels, whole numbers in their order, others alphabetically.

    Rows that do not fit are left for `encode_labelled` to name.
    """
    found: set[str] = set()
    for row in rows if kind in CLASSES else ():
        labels = row.labels if isinstance(row, Tagged) else [row.label] if isinstance(row, Labelled) else []
        found |= {str(label) for label in labels if not _is_score(label)}
    numeric = all(label.removeprefix("-").isdecimal() for label in found)
    return Problem(kind, tuple(sorted(found, key=_as_number if numeric else str)), seed)


def encode_labelled(row: Row, codec: Codec, max_length: int, problem: Problem) -> Example | Dropped:
    """One row for a head. Raises DataError, naming the row, for a label or a kind of row that does not fit."""
    labels = label_numbers(row, problem)
    if isinstance(row, Tagged):
        return _words(row, codec, max_length, labels)
    assert isinstance(row, Labelled)
    first, second = row.text, row.text_pair
    if second and "sep_token" not in codec.tokens:
        # nothing would stand between the two texts, or a second beginning token
        first, second = f"{first}\n{second}", None
    return _texts(codec, max_length, first, second, row.where, labels)


def label_numbers(row: Row, problem: Problem) -> tuple[float, ...]:
    """The label of a row (those of its words) as places in the list of labels, or as the number it is.

    Raises DataError naming the row.
    """
    wanted = Tagged if problem.kind == "tokens" else Labelled
    if not isinstance(row, wanted):
        raise _wrong_row(row, problem)
    if problem.kind == "regression":
        assert isinstance(row, Labelled)
        return (_score(row),)
    labels = row.labels if isinstance(row, Tagged) else (row.label,)
    return tuple(_place(label, problem, row.where) for label in labels)


def label_names(labels: Iterable[float], problem: Problem) -> list[str]:
    """The inverse: names of labels, numbers as text."""
    if problem.kind == "regression":
        return [f"{label:g}" for label in labels]
    return [problem.labels[int(label)] for label in labels]


# texts


def _texts(
    codec: Codec, max_length: int, text: str, pair: str | None, where: str, labels: tuple[float, ...]
) -> Example | Dropped:
    first, second = codec.pieces(text), codec.pieces(pair) if pair else None
    cut = _cut(codec, first, second, max_length)
    if isinstance(cut, str):
        return Dropped(cut, where)
    ids, types, _ = framed(codec, first, second)
    return Example(ids, [False] * len(ids), where, cut, 0, labels, types)


def _words(row: Tagged, codec: Codec, max_length: int, labels: tuple[float, ...]) -> Example | Dropped:
    whole = codec.pieces(" ".join(row.words))
    cut = _cut(codec, whole, None, max_length)
    if isinstance(cut, str):
        return Dropped(cut, row.where)
    ids, types, lead = framed(codec, whole, None)
    places = _first_pieces(row.words, whole.offsets)
    learnt = [False] * len(ids)
    kept = []
    for place, label in zip(places, labels, strict=True):
        if place is not None:
            learnt[place + lead] = True
            kept.append(label)
    return Example(ids, learnt, row.where, cut, 0, tuple(kept), types) if kept else Dropped(EMPTY, row.where)


def _first_pieces(words: tuple[str, ...], offsets: list[tuple[int, int]]) -> list[int | None]:
    """The first token of each word in their joined text; None for words that were cut off or have none of their own."""
    found: list[int | None] = []
    token, start = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1  # of the word before, or the space between
        own = token < len(offsets) and offsets[token][0] < end
        found.append(token if own else None)
        token += own
        start = end + 1
    return found


def _cut(codec: Codec, first: Encoding, second: Encoding | None, max_length: int) -> int | str:
    """Cuts the ends of texts until they fit, of two the longer one first; answers tokens cut, or why it cannot be."""
    lengths = [len(first), len(second) if second else 0]
    if not sum(lengths):
        return EMPTY
    added = codec.frame_tokens(second is not None)
    room = max_length - max(added, int(codec.adds_bos))
    if room < 1 + (second is not None):
        return NO_ROOM
    over = max(0, sum(lengths) - room)
    if over:
        short = min(min(lengths), room // 2)
        keep = (room - short, short) if lengths[0] >= lengths[1] else (short, room - short)
        first.truncate(keep[0])
        if second is not None:
            second.truncate(keep[1])
    return over


def framed(codec: Codec, first: Encoding, second: Encoding | None) -> tuple[list[int], tuple[int, ...], int]:
    """Ids, types where they differ, and how many tokens were put in front."""
    found = codec.framed(first, second)
    ids, types = list(found.ids), list(found.type_ids)
    lead = found.special_tokens_mask.index(0)
    if codec.adds_bos and codec.bos is not None and ids[:1] != [codec.bos]:
        ids, types, lead = [codec.bos, *ids], [0, *types], lead + 1
    elif not codec.adds_bos and codec.bos is not None and lead and ids[:1] == [codec.bos]:
        ids, types, lead = ids[1:], types[1:], lead - 1
    return ids, tuple(types) if any(types) else (), lead


# labels


def _place(label: str | int | float, problem: Problem, where: str) -> float:
    if _is_score(label):
        hint = "set objective.problem to regression, or name classes with text or whole numbers"
        raise DataError(f"the label {label} is a score, no class", where=where, hint=hint)
    try:
        return problem.labels.index(str(label))
    except ValueError as error:
        known = ", ".join(problem.labels[:10]) + (" ..." if len(problem.labels) > 10 else "")
        message = f"the label {str(label)[:80]!r} is not among those of the training data: {known}"
        raise DataError(message, where=where, hint="add rows with it to the training data, or leave it out") from error


def _score(row: Labelled) -> float:
    try:
        found = float(row.label)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        hint = "set objective.problem to classification"
        raise DataError(f"the label {str(row.label)[:80]!r} is no number", where=row.where, hint=hint)
    return found


def _is_score(label: str | int | float) -> bool:
    """Whether a label is a number with a fraction, which some files can only hold as text."""
    if not isinstance(label, str):
        return isinstance(label, float)
    whole, point, part = label.strip().removeprefix("-").partition(".")
    return bool(point) and (whole + part).isdecimal()


def _as_number(label: str) -> int:
    return int(label)


def _wrong_row(row: Row, problem: Problem) -> DataError:
    keys = "tokens and labels" if problem.kind == "tokens" else "text and label"
    hint = f"rows have the keys {keys}; see data.format"
    if isinstance(row, Labelled | Tagged):
        other = "tokens" if isinstance(row, Tagged) else "classification or regression"
        hint = f"for these rows set objective.problem to {other}"
    return DataError(f"objective predict ({problem.kind}) cannot learn from this row", where=row.where, hint=hint)
