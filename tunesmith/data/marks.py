"""Stand-ins for text that a template must not see, and their way back.

The one idea: while a template runs, every control-token string inside a message is one character that means
nothing to it and that no message contains; afterwards it is the string again, known to be ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tunesmith.data.codec import Answer, Codec, Control, Rendered
from tunesmith.data.rows import Message

# Two planes for private use: layouts are studied with characters of the first, strings become characters of the
# second. A message that holds such characters has them replaced, too, and gets them back.
_MARKS, _STRINGS = 0xF0000, 0x100000
BOS = chr(0x10FFFD)
_RESERVED = re.compile(f"[{chr(_MARKS)}-{BOS}]")


def mark(number: int) -> str:
    """One character that stands for the content of a message while a layout is studied."""
    return chr(_MARKS + number)


class Guard:
    """Replaces control-token strings of one dialogue by characters, and remembers which."""

    def __init__(self, finders: Finders) -> None:
        self._all, self._special = finders
        self.strings: dict[str, str] = {}
        self._characters: dict[str, str] = {}

    def message(self, message: Message) -> Message:
        """The same message with characters for control-token strings, also for parts of one at its edges."""
        # what a model itself writes, such as <think>, is structure in its own turns
        finder = self._special if message.role == "assistant" else self._all
        content, context = self._safe(message.content, finder), self._safe(message.context, finder)
        if content is message.content and context is message.context:
            return message
        return replace(message, content=content, context=context)

    def _safe(self, text: str, finder: _Finder) -> str:
        if not finder.may_hold(text):
            return text
        text = finder.pattern.sub(lambda match: self._character(match.group()), text)
        head, tail = finder.edges(text)
        if tail:
            text = text[: tail[0]] + self._character(text[tail[0] : tail[1]]) + text[tail[1] :]
        if head:
            text = text[: head[0]] + self._character(text[head[0] : head[1]]) + text[head[1] :]
        return text

    def _character(self, string: str) -> str:
        if string not in self._characters:
            character = chr(_STRINGS + len(self.strings))
            self._characters[string] = character
            self.strings[character] = string
        return self._characters[string]


class _Finder:
    """Where control-token strings are in a text, and where a part of one touches its edges."""

    def __init__(self, controls: frozenset[str]) -> None:
        choices = "|".join(re.escape(text) for text in sorted(controls, key=len, reverse=True))
        self.pattern = re.compile(f"{choices}|{_RESERVED.pattern}" if choices else _RESERVED.pattern)
        self._heads = {text[i:] for text in controls for i in range(1, len(text))}
        self._tails = {text[:i] for text in controls for i in range(1, len(text))}
        self._longest = max(map(len, controls), default=0)
        ends = {text[0] for text in controls} | {text[-1] for text in controls}
        self._suspects = re.compile(f"[{re.escape(''.join(sorted(ends)))}{chr(_MARKS)}-{BOS}]")

    def may_hold(self, text: str) -> bool:
        return self._suspects.search(text) is not None

    def edges(self, text: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Spans at the start and end (white space aside, a template may trim it) that could complete a token."""
        end = len(text.rstrip())
        start = len(text) - len(text.lstrip())
        sizes = range(min(self._longest, end - start), 0, -1)
        tail = next(((end - n, end) for n in sizes if text[end - n : end] in self._tails), None)
        end = tail[0] if tail else end
        sizes = range(min(self._longest, end - start), 0, -1)
        head = next(((start, start + n) for n in sizes if text[start : start + n] in self._heads), None)
        return head, tail


Finders = tuple[_Finder, _Finder]


def find_controls(controls: Mapping[str, Control]) -> Finders:
    """What guards look for: all control tokens, and those marked special alone."""
    special = frozenset(text for text, control in controls.items() if control.special)
    return _Finder(frozenset(controls)), _Finder(special)


class Writer:
    """Puts rendered pieces together: characters back to strings, one beginning token, spans counted."""

    def __init__(self, guard: Guard, codec: Codec) -> None:
        self._strings = guard.strings
        self._bos = codec.bos_token or ""
        self._pieces: list[str] = []
        self._length = 0
        self._answers: list[Answer] = []
        self._protected: list[tuple[int, int]] = []

    def write(self, raw: str) -> None:
        """Text that is not an answer."""
        at = 0
        for match in _RESERVED.finditer(raw):
            self._add(raw[at : match.start()])
            self._back(match.group())
            at = match.end()
        self._add(raw[at:])

    def answer(self, raw: str, end: str | None, supervised: bool) -> None:
        """An assistant's turn; `end` is written behind it where the template itself writes no end token."""
        start = self._length
        self.write(raw)
        self._add(end or "")
        self._answers.append(Answer(start, self._length, supervised))

    def rendered(self, bos: bool) -> Rendered:
        """Everything written; `bos` only where the text does not start with that token itself."""
        text = "".join(self._pieces)
        bos = bos and not text.startswith(self._bos)
        return Rendered(text, tuple(self._answers), tuple(self._protected), bos)

    def _back(self, character: str) -> None:
        if character == BOS and character not in self._strings:
            # a template may write it before every turn; a document has one beginning
            self._add(self._bos if self._length == 0 else "")
            return
        string = self._strings.get(character, character)
        self._protected.append((self._length, self._length + len(string)))
        self._add(string)

    def _add(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._length += len(text)
