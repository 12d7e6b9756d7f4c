"""Where in a rendered dialogue the answers are: from the end of their prompt to their end token.

The one idea: the shape of a rendering depends on the roles alone, so it is learnt once per sequence of roles from
marked messages and then only compared; a row that does not fit is searched, prompt by prompt. Errors name the template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from tunesmith.core.errors import DataError
from tunesmith.data.codec import Codec
from tunesmith.data.marks import mark
from tunesmith.data.rows import Message

if TYPE_CHECKING:
    from tunesmith.data.templates import Template


@dataclass(frozen=True, slots=True)
class Place:
    """Characters [start, end) that turn number `turn` wrote; `unended` where the template writes no end token."""

    start: int
    end: int
    turn: int
    unended: bool


@dataclass(frozen=True, slots=True)
class _Slot:
    """An assistant's content among all contents: how much text before and behind it belongs to the answer."""

    content: int
    turn: int
    lead: int
    tail: int
    unended: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """What a template writes around the contents of one sequence of roles: literals, one more than contents."""

    literals: tuple[str, ...]
    slots: tuple[_Slot, ...]

    def match(self, raw: str, contents: Sequence[str]) -> list[Place] | None:
        """The answers of a rendering, or None when it is not these literals around these contents."""
        if not raw.startswith(self.literals[0]):
            return None
        at = len(self.literals[0])
        spans = []
        for content, behind in zip(contents, self.literals[1:], strict=True):
            for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
                end = at + len(variant)
                if raw.startswith(variant, at) and raw.startswith(behind, end):
                    break
            else:
                return None
            spans.append((at, end))
            at = end + len(behind)
        if at != len(raw):
            return None
        places = ((*spans[slot.content], slot) for slot in self.slots)
        return [Place(start - slot.lead, end + slot.tail, slot.turn, slot.unended) for start, end, slot in places]


def build_layout(template: Template, signature: tuple[tuple[str, int], ...], generate: bool) -> Layout | None:
    """The layout of a sequence of (role, number of contents); None where contents are moved or repeated.

    Raises DataError when the template leaves a role out, or writes no prompt that its dialogues start with.
    """
    firsts = list(accumulate((count for _, count in signature), initial=0))
    turns = [
        Message(role, mark(first), context=mark(first + 1) if count == 2 else "")
        for (role, count), first in zip(signature, firsts, strict=False)
    ]
    raw = template.raw(turns, generate)
    marks = [mark(number) for number in range(firsts[-1])]
    for (role, count), first in zip(signature, firsts, strict=False):
        if any(one not in raw for one in marks[first : first + count]) and role != "assistant":
            raise DataError(f"the template {template.name} leaves {role} messages out")
    found = [character for character in raw if character in set(marks)]
    if found != marks:
        return None
    literals = tuple(re.split("|".join(marks), raw)) if marks else (raw,)
    slots = []
    for turn, (role, _) in enumerate(signature):
        if role == "assistant":
            number = firsts[turn]
            start = _prompt_end(template, turns, turn, raw, generate)
            end = ending(literals[number + 1], template.codec)
            unended = not _ends_turn(end, template)
            tail = 0 if unended or end is None else literals[number + 1].index(end) + len(end)
            slots.append(_Slot(number, turn, raw.index(mark(number)) - start, tail, unended))
    return Layout(literals, tuple(slots))


def search_places(template: Template, turns: Sequence[Message], raw: str, generate: bool) -> list[Place]:
    """The same for a rendering that depends on its contents: every prompt is rendered and compared."""
    places = []
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        start = _prompt_end(template, turns, number, raw, generate)
        end = raw.find(template.end, start)
        unended = end < 0
        if unended:
            end = _content_end(raw, turn.text, start)
        if end < 0 or not _agree(raw[start:end], turn.text):
            raise DataError(f"turn {number + 1} cannot be found in what the template {template.name} writes")
        places.append(Place(start, end if unended else end + len(template.end), number, unended))
    return places


def ending(behind: str, codec: Codec) -> str | None:
    """The control token that follows a content, white space aside, or None."""
    rest = behind.lstrip()
    found = [text for text in codec.controls if rest.startswith(text)]
    return max(found, key=len, default=None)


def _ends_turn(end: str | None, template: Template) -> bool:
    # what follows may also be the header of the next turn: only a token that is known to end counts
    return end is not None and (end == template.end or template.codec.controls[end].id in template.codec.stop_ids)


def _prompt_end(template: Template, turns: Sequence[Message], number: int, raw: str, generate: bool) -> int:
    """Where the prompt of a turn ends in the whole rendering; for an earlier turn at least where its content begins."""
    prompt = template.raw(turns[:number], True)
    if raw.startswith(prompt):
        return len(prompt)
    if number == len(turns) - 1 and not generate:
        hint = "use another template: alpaca, or a .jinja file"
        text = f"the template {template.name} prompts for an answer otherwise than it writes one"
        raise DataError(text, hint=hint)
    marked = list(turns)
    marked[number] = replace(turns[number], content=mark(0), context="")
    start = template.raw(marked, generate).find(mark(0))
    if start < 0 or template.raw(marked, generate)[:start] != raw[:start]:
        raise DataError(f"turn {number + 1} cannot be found in what the template {template.name} writes")
    return start


def _content_end(raw: str, content: str, start: int) -> int:
    for variant in (content, content.strip()):
        found = raw.find(variant, start)
        if found >= 0:
            return found + len(variant)
    return -1


def _agree(written: str, content: str) -> bool:
    """Whether one holds the other, white space aside: templates drop or add thoughts around an answer."""
    left, right = ("".join(text.split()) for text in (written, content))
    return left in right or right in left
