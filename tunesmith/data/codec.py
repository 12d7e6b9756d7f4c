"""Text to token ids and back, from the tokenizer files of a model folder, without transformers.

The one idea: control tokens are found here, in the text that a template wrote, and nowhere else; all other text
is encoded with control tokens switched off, so that no user can write one. `templates` makes the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from tunesmith.core.errors import ModelError
from tunesmith.core.files import os_error, read_json

# Added tokens that are words of a markup language (gemma has them) are ordinary text, not structure of a dialogue.
_MARKUP = re.compile(
    r"[abispu]|em|[bht]r|t[dh]|li|[ou]l|h\d|del|ins|su[bp]|div|pre|img|code|span|body|head|html|table|thead|tbody|tfoot"
    r"|strong|caption|blockquote"
)
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\uff5c?<[^<>]*\uff5c>|<\|[^<>]*\|>")
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SHORT = 48  # longest piece (characters) whose ids are remembered: role names and line ends, over and over


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters [start, end) of a rendered text that an assistant wrote, end token included."""

    start: int
    end: int
    supervised: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text.

    Attributes:
        text: what the model reads, control tokens written out.
        answers: the assistant's turns, ascending. Where one starts, tokens do not reach across.
        protected: spans [start, end) in which control-token strings are ordinary text.
        bos: whether the beginning token is put before it (false where the text itself starts with it, too).
    """

    text: str
    answers: tuple[Answer, ...] = ()
    protected: tuple[tuple[int, int], ...] = ()
    bos: bool = False


@dataclass(frozen=True, slots=True)
class Control:
    """An added token that structures text: its id, and whether it swallows the white space beside it."""

    id: int
    special: bool
    left: bool
    right: bool


class Codec:
    """The tokenizer of a model folder.

    Attributes:
        folder: where it was opened.
        tokens: the named special tokens, as in `{"eos_token": "</s>"}`.
        controls: every control token by its string.
        chat_template: the model's own template, or None.
        stop_ids: what ends a generation: the end token and those of generation_config.json.
        adds_bos: whether plain text gets the beginning token in front by default.
        splits: whether an encoder reads the prompt and a decoder writes the answer, both being texts of their own.
    """

    @classmethod
    def open(cls, folder: Path | str) -> Codec:
        """Reads tokenizer.json and the files beside it. Raises ModelError naming the file that is missing."""
        folder = Path(folder)
        config = _optional(folder / "tokenizer_config.json")
        tokens = _named_tokens(folder, config)
        tokenizer = _tokenizer(folder, config)
        codec = cls(tokenizer, tokens, config, folder, chat_template=_chat_template(folder, config))
        codec.splits = _optional(folder / "config.json").get("is_encoder_decoder") is True
        return codec

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: dict[str, str],
        config: dict[str, Any],
        folder: Path,
        chat_template: str | None = None,
    ) -> None:
        self.folder = folder
        self.tokens = tokens
        self.chat_template = chat_template
        self._tokenizer = tokenizer
        self.bos, self.eos, self.pad = (self._id_of(name) for name in ("bos_token", "eos_token", "pad_token"))
        self.splits = False
        self.adds_bos = self.bos is not None and self._post_processor_adds(config)
        self.controls = _controls(tokenizer, set(tokens.values()))
        self.stop_ids = _stop_ids(folder) | ({self.eos} if self.eos is not None else set())
        # from here on the tokenizer reads every control string as plain text
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in self.controls])
        tokenizer.encode_special_tokens = True
        self._pattern = _alternatives(self.controls)
        self._ids_of_short = lru_cache(4096)(self._ids_of)

    @property
    def eos_token(self) -> str | None:
        """The string of the end token."""
        return self.tokens.get("eos_token")

    @property
    def bos_token(self) -> str | None:
        """The string of the beginning token."""
        return self.tokens.get("bos_token")

    @property
    def frames_pairs(self) -> bool:
        """Whether texts are framed rather than written, two of them with a separator between: encoders' tokenizers."""
        return self.chat_template is None and self.tokens.keys() >= {"cls_token", "sep_token"}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that encoding can give."""
        return 1 + max(self.vocabulary.values(), default=-1)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def sha256(self) -> str:
        """Of the files that decide which ids a text becomes, as 64 hexadecimal digits."""
        found = hashlib.sha256(str(self.splits).encode())
        for path in (self.folder / name for name in _FILES):
            content = path.read_bytes() if path.is_file() else b""
            found.update(f" {path.name} {len(content)} ".encode() + content)
        return found.hexdigest()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out: those marked special, not structure such as `<think>`."""
        return frozenset(control.id for control in self.controls.values() if control.special)

    def encode(self, rendered: Rendered) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is learnt. A prompt and its continuation never share a token."""
        text, answers = rendered.text, rendered.answers
        ids: list[int] = []
        learnt: list[bool] = []
        if rendered.bos and self.bos is not None:
            ids, learnt = [self.bos], [False]
        cuts = sorted({place for answer in answers for place in (answer.start, answer.end)})
        at = 0
        for start, end, core, control in [
            *self._find(text, rendered.protected),
            (len(text), len(text), 0, None),
        ]:
            inside = [cut - at for cut in cuts if at < cut < start]
            for offset, part in self._parts(text[at:start], inside, first=at == 0):
                ids += part
                learnt += [_is_learnt(answers, at + offset)] * len(part)
            if control is not None:
                ids.append(control.id)
                learnt.append(_is_learnt(answers, core))
            at = end
        return ids, learnt

    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""
        return self._ids(text, first=True) if text else []

    def pieces(self, text: str) -> Encoding:
        """The tokens of a text and their places in it; nothing is a control token, and none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def framed(self, first: Encoding, second: Encoding | None = None) -> Encoding:
        """What the tokenizer's own template makes of one text or two (CLS, SEP, the end token)."""
        return self._tokenizer.post_process(first, second)

    def frame_tokens(self, pair: bool) -> int:
        """How many tokens that template adds."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids, without the special ones unless they are asked for."""
        kept = [i for i in ids if i not in self.special_ids] if skip_special else list(ids)
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def token_id(self, text: str) -> int | None:
        """The id of a token by its exact string, or None."""
        found = self._tokenizer.token_to_id(text)
        return None if found is None else int(found)

    def _id_of(self, name: str) -> int | None:
        text = self.tokens.get(name)
        return None if text is None else self.token_id(text)

    def _post_processor_adds(self, config: dict[str, Any]) -> bool:
        stated = config.get("add_bos_token")
        if isinstance(stated, bool):
            return stated
        return self._tokenizer.encode("a").ids[:1] == [self.bos]

    def _find(self, text: str, protected: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, Control | None]]:
        """Start, end, place of the token itself, and the token, of every control token outside `protected`."""
        at = 0
        while match := self._pattern.search(text, at):
            start, end = match.span()
            found = match.group()
            core = start if found in self.controls else start + len(found) - len(found.lstrip())
            if any(low < end and core < high for low, high in protected):
                at = core + 1
                continue
            yield start, end, core, self.controls.get(found) or self.controls[found.strip()]
            at = end

    def _parts(self, text: str, cuts: list[int], first: bool) -> Iterator[tuple[int, list[int]]]:
        """Ids of the text between cuts, each with its offset: as of the whole where that has a border at the cut."""
        done = 0
        head: list[int] = []
        for cut in [*cuts, len(text)]:
            if self.splits and done:
                yield done, self._ids(text[done:cut], first=True)
                done = cut
                continue
            whole = self._ids(text[:cut], first)
            if whole[: len(head)] == head:
                part = whole[len(head) :]
            else:
                part = self._ids_of(text[done:cut], self._inside)
            yield done, part
            head = head + part
            done = cut

    def _ids(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        tokenizer = self._tokenizer if first else self._later
        return (self._ids_of_short if len(text) <= _SHORT else self._ids_of)(text, tokenizer)

    @staticmethod
    def _ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _later(self) -> Tokenizer:
        """For text behind a control token: some tokenizers put a space before the first word of a text only."""
        return _without_space(self._tokenizer, always=False)

    @cached_property
    def _inside(self) -> Tokenizer:
        """For text that goes on in the middle of a sentence: no space is put before it."""
        return _without_space(self._tokenizer, always=True)


def _is_learnt(answers: Sequence[Answer], place: int) -> bool:
    number = bisect_right(answers, place, key=lambda answer: answer.start) - 1
    return number >= 0 and answers[number].supervised and place < answers[number].end


def _optional(path: Path) -> dict[str, Any]:
    found = read_json(path, ModelError) if path.exists() else {}
    if not isinstance(found, dict):
        raise ModelError("holds no JSON object", where=str(path))
    return found


def _tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "save the model's tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        raise ModelError("tokenizer.json is missing", where=str(folder), hint=hint)
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except OSError as error:
        raise os_error(path, error) from error
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"not a readable tokenizer: {error}", where=str(path)) from error
    # a folder may ship with truncation and padding switched on (sentence encoders do)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    listed = config.get("added_tokens_decoder")
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else ():
        if tokenizer.token_to_id(entry["content"]) is None:
            keys = ("lstrip", "rstrip", "single_word", "normalized", "special")
            settings = {key: bool(entry[key]) for key in keys if key in entry}
            tokenizer.add_tokens([AddedToken(entry["content"], **settings)])
    return tokenizer


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    older = _optional(folder / "special_tokens_map.json")
    named = {}
    for name in _NAMES:
        value = config.get(name, older.get(name))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[name] = text
    return named


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError("not UTF-8 text", where=str(path)) from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found if isinstance(found, str) and found.strip() else None


def _stop_ids(folder: Path) -> set[int]:
    found = _optional(folder / "generation_config.json").get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return {int(i) for i in listed if isinstance(i, int)}


def _controls(tokenizer: Tokenizer, named: set[str]) -> dict[str, Control]:
    found = {}
    for number, token in tokenizer.get_added_tokens_decoder().items():
        special = token.special or token.content in named
        if special or _is_structural(token.content):
            found[token.content] = Control(number, special, token.lstrip, token.rstrip)
    return found


def _is_structural(text: str) -> bool:
    return bool(_BRACKETED.fullmatch(text)) and not _MARKUP.fullmatch(text.strip("</>").lower())


def _alternatives(controls: dict[str, Control]) -> re.Pattern[str]:
    def one(text: str) -> str:
        control = controls[text]
        return (r"\s*" if control.left else "") + re.escape(text) + (r"\s*" if control.right else "")

    # longest first: a token must win over another that it starts with
    return re.compile("|".join(one(text) for text in sorted(controls, key=len, reverse=True)) or r"(?!)")


def _without_space(tokenizer: Tokenizer, always: bool) -> Tokenizer:
    """The tokenizer without the space that it puts before a text: `always`, or where only the first text gets it."""
    steps = {name: _state(getattr(tokenizer, name)) for name in ("normalizer", "pre_tokenizer")}
    edited = {name: _spaceless(step, always) for name, step in steps.items()}
    if edited == steps:
        return tokenizer
    written = {**json.loads(tokenizer.to_str()), **edited}
    copy = Tokenizer.from_str(json.dumps(written))
    copy.encode_special_tokens = True
    return copy


def _state(step: Any) -> Any:
    return None if step is None else json.loads(step.__getstate__())


def _spaceless(step: Any, always: bool) -> Any:
    if not isinstance(step, dict):
        return step
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            kept = [_spaceless(inner, always) for inner in step[key]]
            return {**step, key: [inner for inner in kept if inner is not None]}
    kind = step.get("type")
    if kind == "Metaspace" and (always or step.get("prepend_scheme") == "first"):
        return {**step, "prepend_scheme": "never"}
    if always and kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return None if always and kind == "Prepend" else step
