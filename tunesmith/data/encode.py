"""Rows as training examples and as prompts: token ids, what is learnt of them, and what had to be cut.

The one idea: an answer is whole or absent. A row that is too long loses the start of its prompt; a row whose answer
does not fit is left out with a reason. The text comes from `templates`, the ids from `codec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.data.codec import Codec
from tunesmith.data.rows import Compared, Dialogue, Labelled, Message, Row, Tagged, Text
from tunesmith.data.templates import Template, render

TOO_LONG = "the answer alone is longer than max_length"
NOTHING = "no token to learn"
NO_ROOM = "prompt and objective.max_new_tokens are longer than max_length"


@dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens.

    Attributes:
        ids: token ids of prompt and answers.
        supervised: for each token, whether it is learnt, that is, predicted from those before it; never the first.
        where: file and line.
        truncated_tokens: how many were cut off to fit.
        escaped: how many control-token strings of the row were encoded as ordinary text.
        labels: what is to be predicted: one number a row, or one for each supervised token, which then is the token
            that has the label; empty where text is learnt.
        types: of which of two texts each token is, where the tokenizer says so.
        lengths: tokens of each answer's document, which lie end to end, where a row has answers to compare.
        ranks: of each of these answers; lower is better, equal is a tie.
    """

    ids: list[int]
    supervised: list[bool]
    where: str = ""
    truncated_tokens: int = 0
    escaped: int = 0
    labels: tuple[float, ...] = ()
    types: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def longest_tokens(self) -> int:
        """Tokens of its longest document."""
        return max(self.lengths, default=len(self.ids))

    @property
    def answer_tokens(self) -> int:
        """Tokens that are learnt, or of the second text of two."""
        return sum(self.supervised) or sum(self.types)

    def documents(self) -> list[Example]:
        """A document for each answer; the row itself where it has none to compare."""
        if not self.lengths:
            return [self]
        ends = list(accumulate(self.lengths, initial=0))
        return [self._document(start, end) for start, end in pairwise(ends)]

    def _document(self, start: int, end: int) -> Example:
        return Example(self.ids[start:end], self.supervised[start:end], self.where, types=self.types[start:end])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row that the model is to answer itself.

    Attributes:
        ids: what it is given.
        dialogue: the row; its last turn is the answer that the data has, empty where it has none.
        data: the row as its file holds it.
    """

    ids: list[int]
    dialogue: Dialogue
    data: dict[str, Any]

    @property
    def question(self) -> str:
        """The last thing said to the model."""
        return self.dialogue.prompt[-1].text if self.dialogue.prompt else ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be learnt from, and why."""

    reason: str
    where: str = ""


def encode_row(row: Row, template: Template, codec: Codec, max_length: int) -> Example | Dropped:
    """One row as at most `max_length` tokens. Raises DataError when the template does not take it."""
    if isinstance(row, Text):
        return _encode_text(row, codec, max_length)
    if isinstance(row, Tagged):
        hint = "set objective to {kind: predict, problem: tokens}"
        raise DataError("labelled words have no answer to write", where=row.where, hint=hint)
    if isinstance(row, Compared):
        hint = "set objective to reward or dpo; to learn to write, rows have one answer"
        raise DataError("answers to compare, chosen beside rejected, are none to copy", where=row.where, hint=hint)
    dialogue = row.dialogue() if isinstance(row, Labelled) else row
    rendered = render(dialogue, template)
    ids, supervised = codec.encode(rendered)
    found = _fit(ids, supervised, max_length, keep=1 if ids[:1] == [codec.bos] else 0)
    if isinstance(found, str):
        return Dropped(found, dialogue.where)
    return Example(*found, dialogue.where, len(ids) - len(found[0]), len(rendered.protected))


def prompt_ids(
    dialogue: Dialogue | Labelled, template: Template, codec: Codec, shots: Sequence[Dialogue] = ()
) -> list[int]:
    """What a model is given to answer `dialogue`: exactly how its training example starts, solved `shots` before it.

    A last assistant turn is the answer and left out.
    """
    found = dialogue.dialogue() if isinstance(dialogue, Labelled) else dialogue
    turns = found.prompt if found.messages[-1].role == "assistant" else found.messages
    asked = Dialogue(_with_shots(turns, shots, plain=template.name == "plain"), found.where)
    return codec.encode(render(asked, template, generate=True))[0]


def _encode_text(row: Text, codec: Codec, max_length: int) -> Example | Dropped:
    start = [codec.bos] if codec.adds_bos and codec.bos is not None else []
    ids = start + codec.encode_text(row.text) + ([codec.eos] if codec.eos is not None else [])
    kept = ids[:max_length]
    if len(kept) < 2 or not row.text:
        return Dropped(NOTHING, row.where)
    return Example(kept, [False] + [True] * (len(kept) - 1), row.where, len(ids) - len(kept))


def _fit(ids: list[int], supervised: list[bool], max_length: int, keep: int) -> tuple[list[int], list[bool]] | str:
    """Cuts to `max_length`: first what follows the last answer, then the start behind the first `keep` tokens."""
    learnt = [False, *supervised[1:]]  # nothing predicts the first token
    if True not in learnt:
        return NOTHING
    if len(ids) <= max_length:
        return ids, learnt
    answered = len(learnt) - learnt[::-1].index(True)
    end = max(answered, max_length)
    begin = keep + end - max_length
    kept = learnt[begin:end]
    if begin > keep:
        # an answer that lost its beginning, or all of its prompt, is read and not learnt
        first = kept.index(False) if False in kept else len(kept)
        kept[:first] = [False] * first
    if True not in kept:
        return TOO_LONG
    return ids[:keep] + ids[begin:end], learnt[:keep] + kept


def _with_shots(turns: Sequence[Message], shots: Sequence[Dialogue], plain: bool) -> tuple[Message, ...]:
    if not shots:
        return tuple(turns)
    system = [turn for turn in turns[:1] if turn.role == "system"]
    rest = list(turns[len(system) :])
    if plain and rest:
        # a bare model goes on with a list of solved cases; an end token between them would end the list
        cases = ["".join(message.text for message in shot.messages) for shot in shots]
        first = Message(rest[0].role, "\n\n".join([*cases, rest[0].text]))
        return (*system, first, *rest[1:])
    solved = [message for shot in shots for message in shot.messages if message.role != "system"]
    return (*system, *solved, *rest)
