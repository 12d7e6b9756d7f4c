"""Puts rows that `incoming` has read into a store: prompts, answers and what people said, each once however often."""

from __future__ import annotations

import hashlib
import re

from tunesmith.compare.incoming import Incoming, incoming
from tunesmith.compare.store import IMPORTED, NAME, Store, Written
from tunesmith.compare.turns import Sent, Turns
from tunesmith.core.errors import Problems, TunesmithError
from tunesmith.data.sources import open_source


def read_rows(source: str) -> list[Incoming]:
    """The comparisons of a file. Raises DataError listing the rows that are wrong, ResourceError."""
    opened, problems = open_source(source), Problems()
    found: list[Incoming] = []
    for place in range(len(opened)):
        try:
            row = opened[place]
            found.append(incoming(row.data, row.where))
        except TunesmithError as error:
            problems.add(error)
    problems.raise_if_any()
    return found


def add_rows(store: Store, found: list[Incoming]) -> tuple[int, int]:
    """Adds comparisons; gives how many prompts and judgements they hold."""
    numbers = store.add_prompts([one.messages for one in found], [[text for _, text in one.answers] for one in found])
    written: list[Written] = []
    for number, one in zip(numbers, found, strict=True):
        written += [Written(number, system, sample, text) for system, sample, text in _numbered(one)]
    store.add_answers(written)
    return len(set(numbers)), _add_judgements(store, numbers, found)


def _numbered(row: Incoming) -> list[tuple[str, int, str]]:
    """Answers with their number among those of their system."""
    found: list[tuple[str, int, str]] = []
    for system, text in row.answers:
        found.append((system, 1 + sum(name == system for name, *_ in found), text))
    return found


def _add_judgements(store: Store, numbers: list[int], found: list[Incoming]) -> int:
    turns = Turns(store, overlap=1)
    people = {said.annotator: _name(said.annotator) for one in found for said in one.said}
    for name in people.values():
        store.add_annotator(name, IMPORTED)
    sent: list[tuple[str, Sent]] = []
    for number, one in zip(numbers, found, strict=True):
        ranked = {(system, sample): place for place, (system, sample, _) in enumerate(_numbered(one))}
        for said in one.said:
            name = people[said.annotator]
            places = [ranked.get((answer.system, answer.sample)) for answer in turns.order(name, number)]
            if None in places:
                continue  # the prompt has answers from elsewhere, too, of which this says nothing
            client = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()
            ranks = [said.ranks[place] for place in places if place is not None]
            seconds = min(said.seconds, 86_400.0)
            sent.append((name, Sent(client=client, item=number, kind="ranked", ranks=ranks, seconds=seconds)))
    return turns.judge_all(sent)


def _name(told: str) -> str:
    """An annotator's name from whatever another tool calls them."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", told).strip("-._")[:64]
    return name if NAME.fullmatch(name) else IMPORTED
