"""A model judges a comparison: every pair of answers in both orders, kept prompt by prompt, so that it can go on.

What it is asked and how its words are read is in `compare.verdicts`; it is one annotator more, in the group `model`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tunesmith.compare.store import MODEL, Answer, Item, Messages, Store
from tunesmith.compare.turns import Sent, Turns
from tunesmith.compare.verdicts import both_orders, question, ranks, verdict
from tunesmith.core.progress import progress_bar
from tunesmith.run.comparison import Writer, comparable, name_of

CHUNK = 8
MAX_TOKENS = 32  # a letter, and room for a word around it


@dataclass
class Judging:
    """What a judge did.

    Attributes:
        pairs: pairs of answers that it was asked about, each in both orders.
        consistent: of these, those where both orders gave the same.
        unreadable: those where it named no letter.
    """

    prompts: int = 0
    pairs: int = 0
    consistent: int = 0
    unreadable: int = 0


def judge(store: Store, turns: Turns, source: str, write: Writer) -> Judging:
    """Judges what the model has not judged yet. Raises what the writer raises."""
    name, done = name_of(source), Judging()
    store.add_annotator(name, MODEL)
    items, judged = store.judged()
    there = {one.prompt for one in judged if one.annotator == name}
    left = [item for item in comparable(items) if item.id not in there]
    with progress_bar(f"{source} judges", len(left), bytes_=False) as advance:
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            began = time.monotonic()
            orders = [turns.order(name, item.id) for item in chunk]
            asked = [one for item, order in zip(chunk, orders, strict=True) for one in _questions(item, order)]
            said = iter(write(asked, max_tokens=MAX_TOKENS, temperature=0.0, seed=0, progress=lambda *_: None))
            seconds = (time.monotonic() - began) / len(chunk)
            for item, order in zip(chunk, orders, strict=True):
                count = len(order)
                words = [(next(said), next(said)) for _ in combinations(range(count), 2)]
                turns.judge(name, _sent(name, item, count, words, seconds, done))
            advance(start + len(chunk), len(left))
    return done


def _questions(item: Item, order: Sequence[Answer]) -> list[Messages]:
    """Both orders of every pair, one behind the other."""
    return [
        question(item.messages, first.text, second.text)
        for one, other in combinations(order, 2)
        for first, second in ((one, other), (other, one))
    ]


def _sent(name: str, item: Item, count: int, words: list[tuple[str, str]], seconds: float, done: Judging) -> Sent:
    """The judgement that the words on every pair amount to; a pair without a letter makes it a skip."""
    both = [(verdict(one), verdict(other)) for one, other in words]
    results = [both_orders(*pair) for pair in both]
    done.prompts += 1
    done.pairs += len(both)
    done.unreadable += sum(result is None for result in results)
    done.consistent += sum(one is not None and other is not None and one == -other for one, other in both)
    readable = {pair: one for pair, one in zip(combinations(range(count), 2), results, strict=True) if one is not None}
    whole = len(readable) == len(results)
    return Sent(
        client=hashlib.sha256(f"{name}/{item.id}".encode()).hexdigest(),
        item=item.id,
        kind="ranked" if whole else "skip",
        ranks=ranks(count, readable) if whole else None,
        comment="; ".join(f"{one!r} then {other!r}" for one, other in words)[:2000].replace("\0", ""),
        seconds=seconds,
    )
