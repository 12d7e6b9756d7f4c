"""Formats: what the keys of a row mean. One function a format makes a row of `rows`, or says what is wrong.

The one idea: a format is a line in a literal table, keys it needs and a function; nothing is guessed from
values, and a missing key is an error that names file and line, never an empty text. Conversations, which have
most rules, are in `conversations`, answers to compare in `comparisons`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from tunesmith.core.errors import ConfigError, DataError, did_you_mean
from tunesmith.core.files import canonical_json
from tunesmith.data.comparisons import preference, ranking, unpaired
from tunesmith.data.conversations import conversation, messages
from tunesmith.data.lines import SKIP_HINT, RawRow, Source, describe
from tunesmith.data.rows import Dialogue, Labelled, Message, Row, Tagged, Text
from tunesmith.data.take import text, texts

SAMPLED_ROWS = 2_000


@dataclass(frozen=True)
class Format:
    """One way to write rows.

    Attributes:
        needs: keys that every row has.
        may: further keys that mean something.
        never: keys that make it another format, so that it is not found automatically.
        convert: the row of what a file holds; raises DataError without `where`.
    """

    needs: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Row]
    may: tuple[str, ...] = ()
    never: tuple[str, ...] = ("chosen", "rejected")


def _alpaca(data: dict[str, Any]) -> Dialogue:
    turns: list[Message] = []
    if system := text(data, "system", optional=True):
        turns.append(Message("system", system))
    for pair in _history(data):
        turns += [Message("user", pair[0]), Message("assistant", pair[1], supervised=True)]
    turns.append(Message("user", text(data, "instruction"), context=text(data, "input", optional=True)))
    return Dialogue((*turns, _answer(data, "output")))


def _history(data: dict[str, Any]) -> list[list[str]]:
    pairs = data.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair) for pair in pairs
    ):
        raise DataError("the key 'history' holds something else than pairs of texts")
    return pairs


def _dolly(data: dict[str, Any]) -> Dialogue:
    user = Message("user", text(data, "instruction"), context=text(data, "context", optional=True))
    return Dialogue((user, _answer(data, "response")))


def _prompt_completion(data: dict[str, Any]) -> Dialogue:
    user, answer = Message("user", text(data, "prompt")), _answer(data, "completion")
    return Dialogue((user, answer), plain=True, references=texts(data, "references"), table=_table(data))


def _prompts(data: dict[str, Any]) -> Dialogue:
    answers = (texts(data, "answer") if data.get("answer") else ()) or ("",)
    answer = Message("assistant", answers[0], supervised=bool(answers[0]))
    return Dialogue((Message("user", text(data, "prompt", filled=True)), answer), references=answers)


def _table(data: dict[str, Any]) -> str:
    table = data.get("table")
    if table is None or isinstance(table, str):
        return table or ""
    if not isinstance(table, dict):
        raise DataError(f"the key 'table' holds {describe(table)}; {{header, rows}} or the path of a file is needed")
    return canonical_json(table)


def _text(data: dict[str, Any]) -> Text:
    return Text(text(data, "text", filled=True))


def _labelled(data: dict[str, Any]) -> Labelled:
    label = data["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise DataError(f"the key 'label' holds {describe(label)}; a class (text or whole number) or a score is needed")
    if isinstance(label, float) and not math.isfinite(label):
        raise DataError(f"the key 'label' holds {label}; a score is finite")
    if isinstance(label, str) and not label.strip():
        raise DataError("the key 'label' holds an empty text")
    pair = text(data, "text_pair", optional=True) if data.get("text_pair") is not None else None
    return Labelled(text(data, "text"), label, pair)


def _tagged(data: dict[str, Any]) -> Tagged:
    words, labels = data["tokens"], data["labels"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise DataError("the key 'tokens' holds something else than a list of words")
    named = isinstance(labels, list) and all(
        isinstance(label, str | int) and not isinstance(label, bool) for label in labels
    )
    if not named:
        raise DataError("the key 'labels' holds something else than a list of classes (text or whole numbers)")
    if len(words) != len(labels):
        raise DataError(f"there are {len(words)} tokens and {len(labels)} labels")
    return Tagged(tuple(words), tuple(labels))


def _answer(data: dict[str, Any], key: str) -> Message:
    return Message("assistant", text(data, key, filled=True), supervised=True)


# in this order: the first whose keys a row has is its format
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), messages, ("tools", "references"), ("chosen", "rejected", "label")),
    "sharegpt": Format(
        ("conversations",), conversation, ("tools", "system", "references"), ("chosen", "rejected", "label")
    ),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "dolly": Format(("instruction", "response"), _dolly, ("context",)),
    "prompt_completion": Format(
        ("prompt", "completion"), _prompt_completion, ("references", "table"), ("chosen", "rejected", "label")
    ),
    "prompts": Format(
        ("prompt",),
        _prompts,
        ("answer",),
        ("chosen", "rejected", "label", "completion", "response", "output", "answers", "text"),
    ),
    "labelled": Format(("text", "label"), _labelled, ("text_pair",)),
    "tagged": Format(("tokens", "labels"), _tagged),
    "text": Format(("text",), _text, (), ("chosen", "rejected", "label")),
    "preference": Format(("chosen", "rejected"), preference, ("prompt", "conversations", "messages", "system"), ()),
    "ranking": Format(("prompt", "answers", "ranks"), ranking),
    "unpaired": Format(
        ("label",), unpaired, ("prompt", "completion", "messages", "system"), ("chosen", "rejected", "text")
    ),
}


def check_name(name: str) -> str:
    """The name of a format, or `auto`. Raises ConfigError naming the nearest."""
    if name != "auto" and name not in FORMATS:
        known = " ".join(FORMATS)
        hint = did_you_mean(name, FORMATS)
        raise ConfigError(f"{name!r} is no format; there are auto {known}", where="data.format", hint=hint)
    return name


def convert(data: dict[str, Any], name: str, where: str) -> Row:
    """What a file holds as a row of a format.

    Raises DataError naming file, line and key; ConfigError for an unknown format.
    """
    known = FORMATS[check_name(name)]
    missing = [key for key in known.needs if data.get(key) is None]
    if missing:
        raise _lacks(data, name, missing, where)
    try:
        return replace(known.convert(data), where=where)
    except DataError as error:
        raise DataError(f"{error.message} (format {name})", where=where, hint=error.hint or SKIP_HINT) from error


def fits(data: dict[str, Any]) -> str | None:
    """The format whose keys a row has, or None."""
    return next((name for name, known in FORMATS.items() if _fits(data, known)), None)


def _fits(data: dict[str, Any], known: Format) -> bool:
    return all(data.get(key) is not None for key in known.needs) and all(data.get(key) is None for key in known.never)


def detect(rows: Iterable[RawRow]) -> str:
    """The one format of some rows, by their keys alone.

    Raises DataError where rows are of several formats (with the count and the first line of each), or of none.
    """
    counts: dict[str | None, int] = {}
    first: dict[str | None, RawRow] = {}
    for row in rows:
        name = fits(row.data)
        counts[name] = counts.get(name, 0) + 1
        first.setdefault(name, row)
    named = [name for name in counts if name]
    if len(named) > 1:
        seen = "; ".join(f"{name} {counts[name]} (first {first[name].where})" for name in named)
        hint = "split the file by format"
        raise DataError(f"rows of several formats: {seen}", where=_file(first[named[0]]), hint=hint)
    if named:
        # a row that lacks a key is named when it is read
        return named[0]
    if None not in first:
        raise DataError("no rows")
    row = first[None]
    nearest_name = _most_like(row.data)
    if nearest_name is None:
        keys = ", ".join(row.data) or "no key"
        hint = "set data.format and name the keys as it needs them; formats are " + " ".join(FORMATS)
        raise DataError(f"the keys ({keys}) are of no known format", where=row.where, hint=hint)
    missing = [key for key in FORMATS[nearest_name].needs if row.data.get(key) is None]
    raise _lacks(row.data, nearest_name, missing, row.where)


def format_of(source: Source, named: str = "auto") -> str:
    """The format of a source: as named, as known beforehand, or found from its rows.

    Up to two thousand rows are looked at, the first half of them at the beginning and the others spread over the
    source; where they disagree every row is looked at, so that the counts in the message are exact. Rows that are
    damaged do not vote. Raises DataError, ConfigError.
    """
    if check_name(named) != "auto":
        return named
    if source.format != "auto":
        return source.format
    size = len(source)
    head = min(size, SAMPLED_ROWS // 2)
    spread = range(head, size, max(1, (size - head) // (SAMPLED_ROWS - head) + 1))
    seen = {fits(row.data) for row in _readable(source, chain(range(head), spread))}
    if not seen:
        source[0]  # no row can be read: let the first say why
    sample = range(size) if len(seen - {None}) > 1 else chain(range(head), spread)
    return detect(_readable(source, sample))


def _readable(source: Source, places: Iterable[int]) -> Iterator[RawRow]:
    for place in places:
        with suppress(DataError):  # raised again when the row is read for training
            yield source[place]


def _most_like(data: dict[str, Any]) -> str | None:
    if any(all(key in data for key in known.needs) for known in FORMATS.values()):
        return None  # complete but for a key that makes it something else

    def likeness(name: str) -> int:
        known = FORMATS[name]
        return 10 * sum(key in data for key in known.needs) + sum(key in data for key in known.may)

    best = max(FORMATS, key=likeness)
    judged = any(data.get(key) is not None for key in FORMATS[best].never)
    return best if likeness(best) >= 10 and not judged else None


def _lacks(data: dict[str, Any], name: str, missing: list[str], where: str) -> DataError:
    keys = " and ".join(repr(key) for key in missing)
    there = ", ".join(key for key in data if data[key] is not None) or "no key"
    nulls = [key for key in missing if key in data]
    null = f" ({', '.join(nulls)} is null)" if nulls else ""
    other = fits(data)
    hint = f"set data.format to {other or 'prompt_completion'}, or rename the key"
    if other:
        hint = f"this row is {other}: set data.format to {other}, or split the file by format"
    plural = "s" if len(missing) > 1 else ""
    return DataError(f"format {name} needs the key{plural} {keys}; the row has {there}{null}", where=where, hint=hint)


def _file(row: RawRow) -> str:
    return row.where.split(" (row")[0].rpartition(":")[0] or row.where
