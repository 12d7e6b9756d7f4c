"""Gives annotators prompts and takes their judgements: each once, each on the disk before it is answered.

The one idea: what a judgement's sender repeats (its own identifier) is what makes a repeated request harmless. Which
prompt is next, and in which order answers are shown, follows from the store and the seed.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator
from sqlalchemy import Connection, Row, and_, delete, func, insert, select

from tunesmith.compare.store import APART, NAME, STANDING, Answer, Messages, Store
from tunesmith.compare.tables import annotators, answers, judgements, prompts, scores, shown, undone
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import canonical_json
from tunesmith.core.judged import Kind
from tunesmith.core.rng import seed_for
from tunesmith.core.section import Section

HELD_SECONDS = 900.0
MOST_POINTS = 5


class Refused(TunesmithError):
    """A judgement that cannot be taken because of what it says."""


class Conflict(Refused):
    """It would be right, but for what is there already."""


class Sent(Section):
    """A judgement as the page sends it.

    Attributes:
        client: the sender's own identifier of it; the same judgement sent again has the same.
        item: number of the prompt.
        kind, ranks, comment, seconds: as in `Judged`; ranks in the order shown.
        scores: criterion -> points of each answer, None where not given.
    """

    client: str = Field(min_length=8, max_length=64)
    item: int = Field(ge=1, lt=2**31)
    kind: Kind
    ranks: list[int] | None = Field(default=None, max_length=64)
    comment: str = Field(default="", max_length=10_000)
    seconds: float = Field(default=0.0, ge=0, le=86_400)
    scores: dict[str, list[int | None]] = Field(default_factory=dict, max_length=32)

    @field_validator("client", "comment")
    @classmethod
    def _can_be_kept(cls, text: str) -> str:
        # PostgreSQL has no place for NUL, and no database for half of a surrogate pair
        if "\0" in text or text.encode("utf-8", "ignore").decode() != text:
            raise ValueError("holds a character that cannot be kept")
        return text


@dataclass(frozen=True)
class Turn:
    """What an annotator sees next.

    Attributes:
        item: number of the prompt; None where nothing is left.
        messages, answers: of the prompt; answers in the order to show.
        waiting: others are looking at what is left.
        done: judgements of this annotator that stand.
        left: prompts that this annotator may still judge, this one among them.
        last: identifier of the newest judgement that can be taken back.
    """

    item: int | None
    messages: Messages
    answers: list[Answer]
    waiting: bool
    done: int
    left: int
    last: str | None


class Turns:
    """Prompts out, judgements in.

    Args:
        overlap: how many annotators judge each prompt.
        rubric: criteria that answers may be scored by.
        seed: of the order in which answers are shown.
    """

    def __init__(self, store: Store, *, overlap: int, rubric: tuple[str, ...] = (), seed: int = 0) -> None:
        self.store, self.overlap, self.rubric, self.seed = store, overlap, rubric, seed

    def next(self, name: str, now: float | None = None) -> Turn:
        """The prompt that an annotator is to judge now; asked again, the same."""
        with self.store.writing() as connection:
            return self._next(connection, _person(connection, name), time.time() if now is None else now)

    def order(self, name: str, prompt: int) -> list[Answer]:
        """The answers to a prompt in the order in which an annotator sees them."""
        with self.store.reading() as connection:
            return self._order(connection, _person(connection, name), prompt)

    def judge(self, name: str, sent: Sent) -> None:
        """Keeps a judgement. When this returns it is on the disk; sent again, nothing changes. Raises Refused."""
        with self.store.writing() as connection:
            self._keep(connection, _person(connection, name), sent)

    def judge_all(self, found: Iterable[tuple[str, Sent]]) -> int:
        """Keeps judgements that came from elsewhere, all or none, but for those that another stands in the way of.

        Gives how many were kept or had been. Raises Refused.
        """
        kept: set[str] = set()
        with self.store.writing() as connection:
            for name, sent in found:
                try:
                    self._keep(connection, _person(connection, name), sent)
                except Conflict:
                    continue
                kept.add(sent.client)
        return len(kept)

    def undo(self, name: str, client: str, judgement: str, now: float | None = None) -> None:
        """Takes back one's own judgement, which is then shown again; sent again, nothing changes. Raises Refused."""
        now = time.time() if now is None else now
        with self.store.writing() as connection:
            person = _person(connection, name)
            if connection.execute(select(undone).where(undone.c.client == client)).first():
                return
            mine = and_(judgements.c.client == judgement, judgements.c.annotator == person.id)
            row = connection.execute(select(judgements).where(mine, STANDING)).first()
            if row is None:
                raise Conflict("there is no such judgement to take back")
            connection.execute(insert(undone).values(judgement=row.id, client=client, at=now))
            self._hold(connection, person, row.prompt, now)

    def _keep(self, connection: Connection, person: Row[Any], sent: Sent) -> None:
        digest = hashlib.sha256(canonical_json(sent.model_dump()).encode()).hexdigest()
        there = connection.execute(select(judgements).where(judgements.c.client == sent.client)).first()
        if there is not None:
            if there.digest != digest or there.annotator != person.id:
                raise Conflict("another judgement has this identifier")
            return
        order = self._order(connection, person, sent.item)
        self._check(sent, len(order))
        mine = and_(judgements.c.annotator == person.id, judgements.c.prompt == sent.item)
        if connection.execute(select(judgements.c.id).where(mine, STANDING)).first():
            raise Conflict("you have judged this already, perhaps in another window")
        taken_back = select(func.count()).select_from(judgements.join(undone)).where(mine)
        values = {
            "client": sent.client,
            "digest": digest,
            "annotator": person.id,
            "prompt": sent.item,
            "turn": connection.execute(taken_back).scalar_one(),
            "kind": sent.kind,
            "answers": [answer.id for answer in order],
            "ranks": _ranks(sent, len(order)),
            "comment": sent.comment,
            "seconds": sent.seconds,
            "at": time.time(),
        }
        number = connection.execute(insert(judgements).values(values).returning(judgements.c.id)).scalar_one()
        self._add_scores(connection, number, order, sent)
        held = and_(shown.c.annotator == person.id, shown.c.prompt == sent.item)
        connection.execute(delete(shown).where(held))

    def _next(self, connection: Connection, person: Row[Any], now: float) -> Turn:
        mine = judgements.c.annotator == person.id
        done = {row.prompt for row in connection.execute(select(judgements.c.prompt).where(mine, STANDING))}
        newest = select(judgements.c.client).where(mine, STANDING).order_by(judgements.c.id.desc()).limit(1)
        last = connection.execute(newest).scalar()
        open_, free = self._open(connection, person, done, now)
        if not free:
            return Turn(None, [], [], bool(open_), len(done), len(open_), last)
        chosen = free[0]
        self._hold(connection, person, chosen, now)
        messages = connection.execute(select(prompts.c.messages).where(prompts.c.id == chosen)).scalar_one()
        order = self._order(connection, person, chosen)
        return Turn(chosen, messages, order, False, len(done), len(open_), last)

    def _open(
        self, connection: Connection, person: Row[Any], done: set[int], now: float
    ) -> tuple[list[int], list[int]]:
        """Prompts that lack judgements, and those of them that not enough others are looking at, the next one first."""
        several = (
            select(answers.c.prompt).group_by(answers.c.prompt).having(func.count() > 1).order_by(answers.c.prompt)
        )
        counted = (
            select(judgements.c.prompt, func.count())
            .join(annotators)
            .where(STANDING, judgements.c.kind != "skip", annotators.c.group.not_in(APART))
            .group_by(judgements.c.prompt)
        )
        counts = {prompt: count for prompt, count in connection.execute(counted)}
        held: dict[int, int] = {}
        own: dict[int, float] = {}
        for row in connection.execute(select(shown).where(shown.c.until > now)):
            if row.annotator == person.id:
                own[row.prompt] = row.until
            else:
                held[row.prompt] = held.get(row.prompt, 0) + 1
        lacking = [
            prompt
            for prompt in connection.execute(several).scalars()
            if prompt not in done and counts.get(prompt, 0) < self.overlap
        ]
        free = [one for one in lacking if one in own or counts.get(one, 0) + held.get(one, 0) < self.overlap]
        # what was shown last, then what others have begun, so that overlap is complete early
        free.sort(key=lambda one: (-own.get(one, 0.0), -counts.get(one, 0), one))
        return lacking, free

    def _hold(self, connection: Connection, person: Row[Any], prompt: int, now: float) -> None:
        one = and_(shown.c.annotator == person.id, shown.c.prompt == prompt)
        connection.execute(delete(shown).where(one))
        connection.execute(insert(shown).values(annotator=person.id, prompt=prompt, until=now + HELD_SECONDS))

    def _order(self, connection: Connection, person: Row[Any], prompt: int) -> list[Answer]:
        rows = connection.execute(select(answers).where(answers.c.prompt == prompt).order_by(answers.c.id))
        order = [Answer(row.id, row.system, row.sample, row.text) for row in rows]
        random.Random(seed_for(self.seed, "compare", person.name, prompt)).shuffle(order)
        return order

    def _check(self, sent: Sent, count: int) -> None:
        if count < 2:
            raise Refused("there is no such prompt with answers to compare")
        if sent.kind == "ranked" and (
            sent.ranks is None or len(sent.ranks) != count or not all(1 <= rank <= count for rank in sent.ranks)
        ):
            raise Refused(f"a ranking of {count} answers has {count} ranks from 1 to {count}")
        for criterion, points in sent.scores.items():
            if criterion not in self.rubric:
                raise Refused(f"{criterion[:64]!r} is no criterion of the rubric")
            if len(points) != count or not all(one is None or 1 <= one <= MOST_POINTS for one in points):
                raise Refused(f"a criterion has {count} scores from 1 to {MOST_POINTS}, or null")

    def _add_scores(self, connection: Connection, number: int, order: list[Answer], sent: Sent) -> None:
        values = [
            {"judgement": number, "answer": answer.id, "criterion": criterion, "value": value}
            for criterion, points in sent.scores.items()
            for answer, value in zip(order, points, strict=True)
            if value is not None
        ]
        if values:
            connection.execute(insert(scores), values)


def _person(connection: Connection, name: str) -> Row[Any]:
    row = (
        connection.execute(select(annotators).where(annotators.c.name == name)).first()
        if NAME.fullmatch(name)
        else None
    )
    if row is None:
        raise Refused(f"nobody is called {name[:64]!r}")
    return row


def _ranks(sent: Sent, count: int) -> list[int] | None:
    """What is kept: all equal where all are bad, none where skipped."""
    if sent.kind == "skip":
        return None
    return [1] * count if sent.kind == "bad" else _dense(sent.ranks or [])


def _dense(ranks: list[int]) -> list[int]:
    """The same order with 1, 2, 3 and no gaps, so that equal rankings are equal."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return [places[rank] for rank in ranks]
