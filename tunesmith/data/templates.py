"""Rows as text: the one render function of training, evaluation, generation and serving.

The one idea: a prompt is what the template writes before the answer, and the rendering of the whole dialogue starts
with exactly that; where a template breaks this, rendering says so. Where answers lie is found in `layout`, the
sandbox is in `jinja`, token ids are made in `codec`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ConfigError, DataError, ModelError, did_you_mean
from tunesmith.core.files import os_error
from tunesmith.data.codec import Codec, Rendered
from tunesmith.data.jinja import Program, Refused
from tunesmith.data.layout import Layout, Place, build_layout, ending, search_places
from tunesmith.data.marks import BOS, Guard, Writer, find_controls, mark
from tunesmith.data.rows import Dialogue, Message

NAMED = ("alpaca", "dolly", "plain")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class Template:
    """A compiled template for one tokenizer; made by `open_template`.

    Attributes:
        name: what was asked for, or what was found, as in `chat template of the model`.
        source: the text of the template; `sha256` is its hash.
        end: the token string that ends an assistant's turn.
        own: whether it is the model's own, which then alone decides about the beginning token.
        folds_system: whether a system message is put in front of the first user turn, as the template takes none.
    """

    def __init__(self, name: str, source: str, codec: Codec, *, own: bool = False, trusted: bool = False) -> None:
        self.name = name
        self.source = source
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self.own = own
        self.codec = codec
        self._names = {**codec.tokens, "tools": None, "documents": None}
        if codec.bos_token is not None:
            self._names["bos_token"] = BOS
        self.finders = find_controls(codec.controls)
        self._program = Program(source, f"template {name}", self._samples(), trusted)
        self.layout = lru_cache(256)(self._layout)
        self.folds_system = False
        self._header = ""
        self.end = ""
        self._study()

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a generated turn."""
        end = self.codec.token_id(self.end)
        return frozenset(self.codec.stop_ids | ({end} if end is not None else set()))

    def raw(self, messages: Sequence[Message], generate: bool) -> str:
        """What the template writes, marks still in it. Raises Refused, ConfigError."""
        text = self._program.render(self._inputs(messages, generate))
        return text + self._header if generate else text

    def fields(self, message: Message) -> tuple[str, ...]:
        """The contents of a message as the template reads them: one, or the instruction and its context."""
        if self._program.reads_context and message.context:
            return message.content, message.context
        return (message.text,)

    def folded(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with the system message moved into the first user turn where the template needs that."""
        found = tuple(messages)
        if not self.folds_system or len(found) < 2 or found[0].role != "system":
            return found
        system, first, *rest = found
        return (Message(first.role, f"{system.text}\n\n{first.content}", context=first.context), *rest)

    def _inputs(self, messages: Sequence[Message], generate: bool) -> dict[str, Any]:
        listed = [dict(zip(("content", "context"), self.fields(one), strict=False)) for one in messages]
        turns = [{"role": one.role, **entry} for one, entry in zip(messages, listed, strict=True)]
        return {**self._names, "messages": turns, "add_generation_prompt": generate}

    def _samples(self) -> list[dict[str, Any]]:
        """Short conversations on which an unknown template is tried."""
        found = []
        for roles in (("user",), ("system", "user"), ("user", "assistant"), ("user", "assistant") * 2):
            turns = [{"role": role, "content": f"What is {n} + 1?"} for n, role in enumerate(roles)]
            generate = roles[-1] == "user"
            found.append({**self._names, "messages": turns, "add_generation_prompt": generate})
        return found

    def _study(self) -> None:
        """Learns from marked messages how the template treats system messages, headers and ends of turns."""
        user, answer = Message("user", mark(0)), Message("assistant", mark(1))
        try:
            prompt, silent = self.raw([user], True), self.raw([user], False)
            whole = self.raw([user, answer], False)
        except Refused as error:
            raise ConfigError(f"the template refuses a plain conversation: {error}", where=self.name) from error
        if mark(0) not in whole or mark(1) not in whole:
            raise ConfigError("the template does not write what the messages hold", where=self.name)
        place = whole.index(mark(1))
        if prompt == silent and whole.startswith(prompt) and whole[len(prompt) : place].strip():
            # it ignores add_generation_prompt: what it writes before an answer belongs to the prompt all the same
            self._header = whole[len(prompt) : place]
        end = ending(whole[place + 1 :], self.codec)
        if end is None and self.codec.eos_token is None:
            hint = "name one in the model folder's tokenizer_config.json as eos_token"
            where = str(self.codec.folder)
            raise ConfigError("no token ends an answer: neither template nor tokenizer has one", where=where, hint=hint)
        self.end = end or self.codec.eos_token or ""
        self.folds_system = not self._takes_system()

    def _takes_system(self) -> bool:
        try:
            return mark(1) in self.raw([Message("system", mark(1)), Message("user", mark(0))], True)
        except (Refused, ConfigError):
            return False

    def _layout(self, signature: tuple[tuple[str, int], ...], generate: bool) -> Layout | None:
        return build_layout(self, signature, generate)


def open_template(spec: str, codec: Codec, *, plain: bool = False) -> Template:
    """The template that `data.template` asks for.

    `auto` is the model's own; where it has none, chatml if the tokenizer has its tokens, else alpaca. Rows that
    are bare prompt and completion (`plain`) are joined as they are, and so are those of an encoder-decoder.

    Raises ConfigError, ModelError for the model's own.
    """
    if spec == "auto" and (plain or (codec.splits and codec.chat_template is None)):
        return Template("plain", _built_in("plain"), codec, trusted=True)
    if spec == "auto" and codec.chat_template is not None:
        return _own(codec.chat_template, codec)
    if spec == "auto":
        name = "chatml" if all(codec.token_id(token) is not None for token in _CHATML_TOKENS) else "alpaca"
        return Template(f"{name} (the model has none)", _built_in(name), codec, trusted=True)
    if spec in NAMED:
        return Template(spec, _built_in(spec), codec, trusted=True)
    if not spec.endswith((".jinja", ".jinja2", ".j2")):
        hint = did_you_mean(spec, ("auto", *NAMED))
        choices = ", ".join(("auto", *NAMED))
        raise ConfigError(f"{spec!r} is not one of {choices} or a .jinja file", where="data.template", hint=hint)
    return Template(spec, _read(Path(spec)), codec)


def _own(source: str, codec: Codec) -> Template:
    try:
        return Template("of the model", source, codec, own=True)
    except ConfigError as error:
        hint = f"name another with data.template (or --template): {', '.join(NAMED)}, or a .jinja file"
        raise ModelError(
            f"its chat template cannot be used: {error.message}", where=str(codec.folder), hint=hint
        ) from error


def render(dialogue: Dialogue | Sequence[Message], template: Template, *, generate: bool = False) -> Rendered:
    """A dialogue as text; with `generate`, a prompt that ends where the assistant is to begin.

    Raises DataError when the template does not take these turns, naming the row.
    """
    where = dialogue.where if isinstance(dialogue, Dialogue) else ""
    turns = template.folded(dialogue.messages if isinstance(dialogue, Dialogue) else dialogue)
    guard = Guard(template.finders)
    guarded = tuple(guard.message(message) for message in turns)
    try:
        raw = template.raw(guarded, generate)
        places = _places(template, guarded, raw, generate)
    except Refused as error:
        raise DataError(f"the template {template.name} refuses it: {error}", where=where) from error
    except DataError as error:
        raise DataError(error.message, where=where, hint=error.hint) from error
    writer = Writer(guard, template.codec)
    at = 0
    for place in places:
        writer.write(raw[at : place.start])
        supervised = turns[place.turn].supervised
        writer.answer(raw[place.start : place.end], template.codec.eos_token if place.unended else None, supervised)
        at = place.end
    writer.write(raw[at:])
    return writer.rendered(bos=not template.own and template.codec.adds_bos)


def _places(template: Template, turns: Sequence[Message], raw: str, generate: bool) -> list[Place]:
    fields = [template.fields(turn) for turn in turns]
    signature = tuple((turn.role, len(parts)) for turn, parts in zip(turns, fields, strict=True))
    layout = template.layout(signature, generate)
    found = layout.match(raw, [part for parts in fields for part in parts]) if layout else None
    return search_places(template, turns, raw, generate) if found is None else found


@cache
def _built_in(name: str) -> str:
    return (Path(__file__).parent / f"{name}.jinja").read_text("utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=f"data.template: {path}") from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", where=f"data.template: {path}") from error
    except OSError as error:
        raise os_error(path, error) from error
