"""Judgements as rows that a reward model trains on: {prompt, chosen, rejected}, or {prompt, answers, ranks}.

The one idea: a judgement is a row, so who disagrees makes two. What cannot be one is counted: skipped and all-bad
prompts, and, among pairs, ties.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from typing import Any, Literal

from tunesmith.compare.store import Item, Messages
from tunesmith.core.judged import Judged

Form = Literal["preference", "ranking"]


def rows(items: Iterable[Item], judged: Iterable[Judged], form: Form) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows, in the order of the judgements, and how many could not be one, by reason."""
    prompts = {item.id: item for item in items}
    found: list[dict[str, Any]] = []
    left_out = {"skipped": 0, "all bad": 0, "ties": 0}
    for one in judged:
        if one.kind != "ranked":
            left_out["skipped" if one.kind == "skip" else "all bad"] += 1
            continue
        about = {"prompt": _prompt(prompts[one.prompt].messages)}
        by = {"annotator": one.annotator}
        ranked = list(zip(one.texts, one.ranks, strict=True))
        if form == "ranking":
            answers = {"answers": list(one.texts), "ranks": list(one.ranks), "systems": list(one.systems)}
            found.append({**about, **answers, **by})
            continue
        for (text, rank), (other, its) in combinations(ranked, 2):
            if rank == its:
                left_out["ties"] += 1
            else:
                better, worse = (text, other) if rank < its else (other, text)
                found.append({**about, "chosen": better, "rejected": worse, **by})
    return found, left_out


def natural_form(items: Iterable[Item]) -> Form:
    """`preference` where every prompt has two answers, `ranking` where one has more."""
    return "preference" if all(len(item.answers) <= 2 for item in items) else "ranking"


def as_lines(found: Iterable[dict[str, Any]]) -> str:
    """JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def _prompt(messages: Messages) -> str | Messages:
    """A single question as a text, a conversation as messages."""
    plain = [
        {"role": one["role"], "content": "\n\n".join(filter(None, (one["content"], one.get("context"))))}
        for one in messages
    ]
    return plain[0]["content"] if len(plain) == 1 and plain[0]["role"] == "user" else plain
