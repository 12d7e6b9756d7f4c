"""A model as annotator: what it is asked about two answers, what it says, and a ranking from both orders.

The one idea: a model prefers places, so every pair is asked in both orders, and one answer is better only where it is
so in both (Zheng et al. 2023, arXiv 2306.05685, section 3.4). Who asks is in `run`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tunesmith.compare.store import Messages

_ASKED = """You compare two answers to the same request. Judge how correct, helpful and clear each is. Do not let the \
order in which they stand, or their length, decide.

[Request]
{request}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter and nothing else: A, B, or C if neither is better."""
_VERDICT = re.compile(r"(?<![A-Za-z'])([ABC])(?![A-Za-z'])")


def question(messages: Messages, first: str, second: str) -> Messages:
    """What a judge is asked about two answers to a conversation."""
    request = "\n\n".join(
        one["content"] if len(messages) == 1 else f"{one['role']}: {one['content']}"
        for one in (
            {**one, "content": "\n\n".join(filter(None, (one["content"], one.get("context"))))} for one in messages
        )
    )
    # in one pass: an answer that holds braces or our own words is put in as it is
    return [{"role": "user", "content": _ASKED.format(request=request, first=first, second=second)}]


def verdict(said: str) -> int | None:
    """1 where the first answer is better, -1 the second, 0 neither; None where the judge said nothing of the kind.

    The last letter that stands alone counts: who explains first decides at the end.
    """
    letters = _VERDICT.findall(said)
    return {"A": 1, "B": -1, "C": 0}[letters[-1]] if letters else None


def both_orders(one: int | None, swapped: int | None) -> int | None:
    """From the verdicts on (a, b) and on (b, a): 1, 0 or -1 for a; None where either is missing."""
    if one is None or swapped is None:
        return None
    return one if one == -swapped else 0


def ranks(count: int, results: Mapping[tuple[int, int], int]) -> list[int]:
    """Ranks of `count` answers from the result of every pair: by points, a win 1 and a tie a half; equal points tie."""
    points = [0.0] * count
    for (first, second), result in results.items():
        points[first] += (1 + result) / 2
        points[second] += (1 - result) / 2
    order = sorted(set(points), reverse=True)
    return [order.index(one) + 1 for one in points]
