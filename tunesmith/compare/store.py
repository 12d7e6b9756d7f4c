"""What a comparison holds: its settings, prompts, answers and annotators, and all judgements that stand.

Everything is added once however often it is sent: prompts by their content, answers by who wrote them, annotators by
name. Giving out prompts and taking judgements is in `turns`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, text

from tunesmith.compare.tables import annotators, answers, judgements, prompts, scores, settings, undone
from tunesmith.core.errors import ConfigError
from tunesmith.core.files import canonical_json
from tunesmith.core.judged import Judged

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CROWD, IMPORTED, MODEL = "crowd", "imported", "model"
APART = (IMPORTED, MODEL)  # groups whose judgements people's do not wait for
# judgements that stand: those that no row takes back
STANDING = judgements.c.id.not_in(select(undone.c.judgement))
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt: its number, who wrote it, the how manieth of theirs it is, its text."""

    id: int
    system: str
    sample: int
    text: str


@dataclass(frozen=True)
class Written:
    """An answer to be added: for which prompt, by whom, the how manieth of theirs, its text."""

    prompt: int
    system: str
    sample: int
    text: str


@dataclass(frozen=True)
class Item:
    """A prompt with the answers to be compared.

    Attributes:
        messages: the conversation before the answer, as {role, content} and context where there is one.
        answers: in the order of their systems' first appearance.
    """

    id: int
    messages: Messages
    answers: list[Answer]


class Store:
    """A comparison in a database; see `tables.connect`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer's overlaps; committed, and on the disk, when the block has ended."""
        with self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(7311)"))
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A snapshot: what is written meanwhile is not seen."""
        options: dict[str, Any] = {"reading": True}
        if self.engine.dialect.name == "postgresql":
            options["isolation_level"] = "REPEATABLE READ"
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    # settings

    @property
    def settings(self) -> dict[str, Any]:
        """What the comparison was begun with; empty in a new database."""
        with self.reading() as connection:
            return {row.key: row.value for row in connection.execute(select(settings))}

    def begin(self, wanted: dict[str, Any]) -> None:
        """Begins a comparison with these settings, or goes on with the one that is there.

        Raises ConfigError where the one that is there has others.
        """
        found = self.settings
        changed = [
            f"{key} is {found[key]!r}, not {value!r}" for key, value in wanted.items() if found.get(key, value) != value
        ]
        if changed:
            hint = "say the same as then to go on with it, or begin another with --out"
            raise ConfigError(f"this comparison was begun with other settings: {'; '.join(changed)}", hint=hint)
        self.set(wanted)

    def set(self, wanted: dict[str, Any]) -> None:
        """Keeps settings."""
        with self.writing() as connection:
            connection.execute(delete(settings).where(settings.c.key.in_(wanted)))
            if wanted:
                connection.execute(insert(settings), [{"key": key, "value": value} for key, value in wanted.items()])

    # prompts and answers

    def add_prompts(self, found: Sequence[Messages], answers: Sequence[Sequence[str]] | None = None) -> list[int]:
        """The number of each prompt, new or not.

        Args:
            answers: that each comes with; the same question with other answers is then another prompt.
        """
        found = [[{key: _kept(value) for key, value in one.items()} for one in messages] for messages in found]
        with self.writing() as connection:
            known = {row.digest: row.id for row in connection.execute(select(prompts.c.digest, prompts.c.id))}
            numbers = []
            for place, messages in enumerate(found):
                told = messages if answers is None else [messages, list(answers[place])]
                digest = hashlib.sha256(canonical_json(told).encode()).hexdigest()
                if digest not in known:
                    values = {"digest": digest, "messages": messages}
                    added = insert(prompts).values(values).returning(prompts.c.id)
                    known[digest] = connection.execute(added).scalar_one()
                numbers.append(known[digest])
        return numbers

    def add_answers(self, found: Sequence[Written]) -> None:
        """Adds answers, all or none; one that is there already stays as it is."""
        with self.writing() as connection:
            places = select(answers.c.prompt, answers.c.system, answers.c.sample)
            there = {tuple(row) for row in connection.execute(places)}
            new = {place: one for one in found if (place := (one.prompt, one.system, one.sample)) not in there}
            if new:
                connection.execute(insert(answers), [asdict(one) | {"text": _kept(one.text)} for one in new.values()])

    def items(self) -> list[Item]:
        """Every prompt with its answers."""
        with self.reading() as connection:
            return list(_items(connection).values())

    # people

    def add_annotator(self, name: str, group: str | None = None) -> None:
        """Adds a person or a model, to `crowd` where no group is said.

        Raises ConfigError for a name that is none, or of somebody who is in another group.
        """
        for word in (name, group or CROWD):
            if not NAME.fullmatch(word):
                hint = "names are up to 64 letters, digits, dots, dashes and underscores"
                raise ConfigError(f"{word!r} is no name", where="--annotators", hint=hint)
        with self.writing() as connection:
            row = connection.execute(select(annotators).where(annotators.c.name == name)).first()
            if row is None:
                connection.execute(insert(annotators).values(name=name, group=group or CROWD))
            elif group not in (None, row.group):
                raise ConfigError(f"{name} is in the group {row.group}, not {group}", where="--annotators")

    def annotators(self) -> list[tuple[str, str]]:
        """(name, group) of everyone."""
        with self.reading() as connection:
            found = connection.execute(select(annotators).order_by(annotators.c.id))
            return [(row.name, row.group) for row in found]

    # judgements

    def judged(self) -> tuple[list[Item], list[Judged]]:
        """Every prompt, and every judgement that stands, oldest first, of one moment."""
        with self.reading() as connection:
            items = _items(connection)
            written = {answer.id: answer for item in items.values() for answer in item.answers}
            points = _scores(connection)
            people = {row.id: row for row in connection.execute(select(annotators))}
            rows = connection.execute(select(judgements).where(STANDING).order_by(judgements.c.id)).all()
        found = []
        for row in rows:
            shown = [written[number] for number in row.answers]
            given = points.get(row.id, {})
            found.append(
                Judged(
                    prompt=row.prompt,
                    annotator=people[row.annotator].name,
                    group=people[row.annotator].group,
                    kind=row.kind,
                    systems=tuple(answer.system for answer in shown),
                    ranks=tuple(row.ranks or ()),
                    texts=tuple(answer.text for answer in shown),
                    seconds=row.seconds,
                    scores={name: tuple(by.get(answer.id) for answer in shown) for name, by in given.items()},
                    comment=row.comment,
                )
            )
        return list(items.values()), found


def _kept(text: str) -> str:
    # PostgreSQL has no place for NUL
    return text.replace("\0", "\u2400")


def _items(connection: Connection) -> dict[int, Item]:
    found = {
        row.id: Item(row.id, row.messages, []) for row in connection.execute(select(prompts).order_by(prompts.c.id))
    }
    for row in connection.execute(select(answers).order_by(answers.c.id)):
        found[row.prompt].answers.append(Answer(row.id, row.system, row.sample, row.text))
    return found


def _scores(connection: Connection) -> dict[int, dict[str, dict[int, int]]]:
    """Judgement -> criterion -> answer -> points."""
    found: dict[int, dict[str, dict[int, int]]] = {}
    for row in connection.execute(select(scores)):
        found.setdefault(row.judgement, {}).setdefault(row.criterion, {})[row.answer] = row.value
    return found
