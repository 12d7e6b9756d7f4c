"""Signs in the log of a run over its own completions that it learns something else than was meant.

Each is a function of the records alone, so that a run says it while it goes on and its report says it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

WINDOW = 5  # records that are looked at together
FAR_NATS = 1.0  # a token: at that distance from the reference, little of it is left
LONGER = 2.0
EQUAL = 0.95
GROWN, FALLEN = 1.1, 0.85  # a reward against its beginning, a score of held-out answers against its best


def signs(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the last records of a run show, by name; empty where all is well."""
    found = {}
    # the middle one: a single token that an update has made rare is a hundred nats by itself
    kl = median(_column(records, "kl")[-WINDOW:] or [0.0])
    if kl > FAR_NATS:
        told = f"the policy is {kl:.2f} nats a token away from the reference"
        found["kl"] = f"{told}: raise objective.kl, or lower train.lr"
    lengths = _column(records, "completion_tokens")
    before, now = _mean(lengths[:WINDOW]), _mean(lengths[-WINDOW:])
    if len(lengths) >= 2 * WINDOW and now > LONGER * before:
        told = f"completions have grown from {before:.0f} to {now:.0f} tokens"
        found["length"] = f"{told}: does the reward pay for length?"
    equal = _column(records, "equal_groups")
    if len(equal) >= WINDOW and _mean(equal[-WINDOW:]) > EQUAL:
        found["equal"] = "all completions of nearly every prompt earn the same: there is nothing left to learn from"
    return found | _apart(records)


def _apart(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What is paid for grows while what held-out answers are judged by falls: the reward has found a way around it."""
    earned = _column(records, "reward")
    before, now = _mean(earned[:WINDOW]), _mean(earned[-WINDOW:])
    if len(earned) < 2 * WINDOW or now - before <= (GROWN - 1) * abs(before):
        return {}
    found = {}
    for name in dict.fromkeys(key for record in records for key in record if key.startswith("eval_")):
        scores = _column(records, name)
        # of these less is better, or nothing is said of answers
        if name in ("eval_loss", "eval_perplexity", "eval_seconds") or len(scores) < 3:
            continue
        best, last = max(scores[:-2]), max(scores[-2:])
        if last < FALLEN * best:
            told = f"the reward has grown from {before:.2f} to {now:.2f} while {name} has fallen from {best:.3g}"
            found[name] = f"{told} to {last:.3g}: look at what is written, and judge by what the reward cannot see"
    return found


def _column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(record[name]) for record in records if isinstance(record.get(name), int | float)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
