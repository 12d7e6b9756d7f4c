"""Rows as a person checks them: what the model will see, with the part that it learns to write.

The one idea: the text is decoded from the token ids that training uses, not taken from the file.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from tunesmith.core.problem import Problem
from tunesmith.data.codec import Codec
from tunesmith.data.encode import Example
from tunesmith.data.labels import label_names


@dataclass(frozen=True)
class Piece:
    """A stretch of a row: whether it is learnt, and whether it is a control token."""

    text: str
    supervised: bool
    control: bool


@dataclass(frozen=True)
class Preview:
    """A document as pieces, its tokens, how many are learnt or were cut off, its labels, or an answer's rank."""

    where: str
    pieces: tuple[Piece, ...]
    tokens: int
    supervised_tokens: int
    truncated_tokens: int
    labels: tuple[str, ...] = ()
    rank: str = ""


def previews(example: Example, codec: Codec, problem: Problem | None = None) -> list[Preview]:
    """An example as a preview, or one for each of the answers that it compares, with its rank in words."""
    if not example.lengths:
        return [preview(example, codec, problem)]
    shown = [preview(document, codec) for document in example.documents()]
    return [replace(one, rank=name) for one, name in zip(shown, rank_names(example.ranks), strict=True)]


def rank_names(ranks: Sequence[int]) -> list[str]:
    """What people call the answers of a row."""
    if len(ranks) == 1:
        return ["good" if ranks[0] == 0 else "bad"]
    if len(ranks) == 2:
        return ["chosen", "rejected"] if ranks[0] < ranks[1] else ["a tie", "a tie"]
    return [f"rank {rank + 1}" for rank in ranks]


def preview(example: Example, codec: Codec, problem: Problem | None = None) -> Preview:
    """The pieces of an example, and its labels for a problem; characters that would act on a terminal are escaped."""
    controls = {control.id for control in codec.controls.values()}
    kinds = [(learnt, token in controls) for token, learnt in zip(example.ids, example.supervised, strict=True)]
    pieces = []
    done = 0
    before = ""
    for (learnt, control), group in groupby(kinds):
        done += len(list(group))
        # some decoders drop the space before the first token: a piece is what it adds to the text so far
        text = codec.decode(example.ids[:done], skip_special=False)
        pieces.append(Piece(visible(text[len(before) :]), learnt, control))
        before = text
    counts = (len(example.ids), sum(example.supervised), example.truncated_tokens)
    labels = tuple(visible(name) for name in label_names(example.labels, problem)) if problem else ()
    return Preview(example.where, tuple(pieces), *counts, labels)


def visible(text: str) -> str:
    """The text with control and direction characters, line ends and tabs aside, written as escapes."""
    return "".join(_escape(one) if _acts(one) else one for one in text)


def _acts(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
