"""A comparison from its folder: opened, filled with answers of models, shown to people, reported, exported.

The database is the comparison; the folder holds it (unless it is PostgreSQL), the secret of its links and its report.
Sampling goes on where it stopped, with the answers that it would have written anyway.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tunesmith.compare.asked import read_prompts
from tunesmith.compare.endpoint import Endpoint
from tunesmith.compare.importing import add_rows, read_rows
from tunesmith.compare.store import Item, Messages, Store, Written
from tunesmith.compare.tables import connect
from tunesmith.compare.turns import Turns
from tunesmith.core.errors import ConfigError
from tunesmith.core.files import write_atomic
from tunesmith.core.progress import Progress, progress_bar
from tunesmith.core.rng import seed_for
from tunesmith.data.rows import Dialogue, Message

DATABASE = "compare.sqlite"
CHUNK = 16  # prompts that are answered, and kept, together


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: what a comparison keeps and does not change."""

    samples: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    template: str = "auto"


class Writer(Protocol):
    """Who answers conversations: a model here, or one behind a server."""

    def __call__(
        self, asked: Sequence[Messages], *, max_tokens: int, temperature: float, seed: int, progress: Progress
    ) -> list[str]: ...


class Filling:
    """What is to be put into a comparison: read, and looked at, before anything is written.

    Args:
        sources: who answers the prompts.
        prompts, rows: where they are, and at most how many.
        imported: a file of comparisons.

    Raises: ConfigError, DataError, ModelError.
    """

    def __init__(
        self, sources: Sequence[str], prompts: str | None, rows: int | None, imported: str | None, sampling: Sampling
    ) -> None:
        self.sampling, self.imported = sampling, imported
        self.rows = read_rows(imported) if imported is not None else []
        self.writers = open_writers(sources, sampling.template)
        self.prompts = read_prompts(prompts, rows) if prompts is not None else []

    def put(self, store: Store) -> None:
        """Adds the rows, has the prompts answered. Raises ConfigError where it was begun with other settings."""
        if self.imported is not None:
            prompts, judgements = add_rows(store, self.rows)
            print(f"{self.imported}: {prompts} prompts, {judgements} judgements", file=sys.stderr)
        if self.prompts:
            store.begin(asdict(self.sampling))
            store.add_prompts(self.prompts)
            sample(store, self.writers, self.sampling)


def is_comparison(folder: Path | str) -> bool:
    """Whether a folder holds the database of a comparison."""
    return (Path(folder) / DATABASE).is_file()


def open_store(folder: Path, database: str | None) -> Store:
    """The comparison of a folder, or of another database. Raises ConfigError, ResourceError."""
    return Store(connect(database or f"sqlite:///{folder.resolve() / DATABASE}"))


def open_turns(store: Store) -> Turns:
    """Prompts out and judgements in, as the comparison is set."""
    found = store.settings
    return Turns(
        store, overlap=found.get("overlap", 1), rubric=tuple(found.get("rubric", ())), seed=found.get("seed", 0)
    )


def open_writers(sources: Sequence[str], template: str) -> dict[str, Writer]:
    """Who answers under each name; models are looked at, and loaded when they are first asked.

    Raises ModelError, ConfigError.
    """
    if len(set(sources)) != len(sources):
        raise ConfigError("a model is named twice", hint="--samples takes several answers of one")
    return {source: _endpoint(source) if Endpoint.is_one(source) else _speaker(source, template) for source in sources}


def sample(store: Store, writers: dict[str, Writer], sampling: Sampling) -> None:
    """Has every prompt answered by everyone, keeping each chunk as soon as it is there. Raises what writers raise."""
    items = store.items()
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    for name in list(writers):
        # let go of when it has answered: the next model needs the memory
        _sample(store, name, writers.pop(name), chunks, sampling)


def _sample(store: Store, name: str, write: Writer, chunks: list[list[Item]], sampling: Sampling) -> None:
    """The answers of one that are missing; a chunk is written whole, so what is drawn depends on nothing else."""
    wanted = [
        (place, chunk, number)
        for place, chunk in enumerate(chunks)
        for number in range(1, sampling.samples + 1)
        if any((name, number) not in {(one.system, one.sample) for one in item.answers} for item in chunk)
    ]
    if not wanted:
        return
    total, done = sum(len(chunk) for _, chunk, _ in wanted), 0
    with progress_bar(f"{name} answers", total, bytes_=False) as advance:
        for place, chunk, number in wanted:
            texts = write(
                [item.messages for item in chunk],
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                seed=seed_for(sampling.seed, "compare", number, place),
                progress=partial(_part, advance, done, total),
            )
            written = [Written(item.id, name, number, text) for item, text in zip(chunk, texts, strict=True)]
            store.add_answers(written)
            done += len(chunk)
            advance(done, total)


def _part(advance: Progress, before: int, total: int, done: int, _: int) -> None:
    advance(before + done, total)


def _speaker(source: str, template: str) -> Writer:
    from tunesmith.run.speaking import Speaker

    speaker = Speaker(source, template=template)

    def write(
        asked: Sequence[Messages], *, max_tokens: int, temperature: float, seed: int, progress: Progress
    ) -> list[str]:
        dialogues = [Dialogue(tuple(_message(one) for one in messages), "--prompts") for messages in asked]
        found = speaker.answer(
            dialogues, max_new_tokens=max_tokens, temperature=temperature, seed=seed, progress=progress
        )
        return [one["completion"] for one in found]

    return write


def _message(one: dict[str, str]) -> Message:
    return Message(one["role"], one["content"], context=one.get("context", ""))


def _endpoint(source: str) -> Writer:
    endpoint = Endpoint(source)

    def write(
        asked: Sequence[Messages], *, max_tokens: int, temperature: float, seed: int, progress: Progress
    ) -> list[str]:
        found: list[str] = []
        for place, messages in enumerate(asked):
            own = seed_for(seed, "compare", place)
            found += endpoint.answer([messages], max_new_tokens=max_tokens, temperature=temperature, seeds=[own])
            progress(place + 1, len(asked))
        return found

    return write


# figures


def report(store: Store, folder: Path, name: str) -> dict[str, Any]:
    """The statistics of what stands; also written as report.html. Raises ResourceError."""
    from tunesmith.evaluate.comparison_page import comparison_page
    from tunesmith.evaluate.comparisons import statistics

    found = statistics(store.judged()[1])
    write_atomic(folder / "report.html", comparison_page(found, name))
    return found


class Live:
    """The statistics page of a comparison that is going on; at most a few seconds old, computed once at a time."""

    SECONDS = 5.0

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self._lock, self._made, self._page = threading.Lock(), 0.0, ""

    def __call__(self) -> tuple[str, str]:
        """The page and its content policy."""
        from tunesmith.evaluate.comparison_page import comparison_page
        from tunesmith.evaluate.comparisons import statistics
        from tunesmith.evaluate.report import page_policy

        with self._lock:
            if not self._page or time.monotonic() - self._made > self.SECONDS:
                self._page = comparison_page(statistics(self.store.judged()[1]), self.name, live=True)
                self._made = time.monotonic()
            return self._page, f"{page_policy()}; frame-ancestors 'none'"


# in and out


def export_rows(store: Store, path: Path, form: str | None) -> tuple[int, str, dict[str, int]]:
    """Writes judgements as rows; gives how many, in which format, and how many judgements could not be one."""
    from tunesmith.compare.outgoing import as_lines, natural_form, rows

    items, judged = store.judged()
    chosen = form or natural_form(items)
    found, left_out = rows(items, judged, chosen)  # type: ignore[arg-type]
    if not found:
        raise ConfigError(
            "there is no judgement that could be a row", where="--export", hint="judge some prompts first"
        )
    write_atomic(path, as_lines(found))
    return len(found), chosen, left_out


def name_of(source: str) -> str:
    """A model's name as an annotator's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-._")[:64] or "model"


def comparable(items: Iterable[Item]) -> list[Item]:
    """Prompts with answers to compare."""
    return [item for item in items if len(item.answers) > 1]
