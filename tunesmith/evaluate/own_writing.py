"""What a report says of a run over its own completions: what is followed, completions over time, and warnings.

The one idea: a reward is worth what it refuses, so that what a constant completion earns stands beside the curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.signs import signs
from tunesmith.evaluate.verdict import mapping, number
from tunesmith.objectives.sampled import EDGES, RATIOS

# key of a record: title of its chart, name of its line
FOLLOWED = {
    "reward": ("Reward", "mean reward"),
    "kl": ("Divergence from the reference, nats a token", "KL"),
    "kl_weight": ("Weight of the divergence", "weight"),
    "divergence": ("Distance from the teacher, nats a token", "distance"),
    "entropy": ("Entropy, nats a token", "entropy"),
    "completion_tokens": ("Length of completions", "tokens"),
    "clip_share": ("Share of actions that are clipped", "clipped"),
    "equal_groups": ("Share of prompts whose completions all earn the same", "equal"),
    "value_loss": ("Error of the value head", "squared error"),
}
STEPS, EARLIER = 5, 3  # rollouts that are shown, and completions of all but the last of them
PARTS = 3  # of the run that have a histogram of ratios each
_LONG = 300


def written(shown: Sequence[dict[str, Any]], constant: Any, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Completions from the beginning to the end, all that are kept of the last; the constant; and what to worry about.

    Args:
        shown: records of rollouts.jsonl.
        constant: {text, reward} of run.json.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for one in shown:
        by_step.setdefault(int(number(one.get("step")) or 0), []).append(one)
    numbers = sorted(by_step)
    places = sorted({round(place * (len(numbers) - 1) / (STEPS - 1)) for place in range(STEPS)}) if numbers else []
    steps = [
        {"number": numbers[place], "rows": [_row(one) for one in by_step[numbers[place]][:most]]}
        for place in places
        for most in [None if place == places[-1] else EARLIER]
    ]
    said = mapping(constant)
    earned = number(said.get("reward"))
    told = {"text": _short(said.get("text")), "reward": f"{earned:.3f}"} if earned is not None else None
    return {"steps": steps, "constant": told, "signs": list(signs(records).values()), "ratios": ratios(records)}


def ratios(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far updates have moved the probability of an action since it was drawn, from the beginning to the end."""
    known = [record for record in records if number(record.get(RATIOS[0])) is not None]
    size, found = max(1, math.ceil(len(known) / PARTS)), []
    for some in (known[start : start + size] for start in range(0, len(known), size)):
        shares = [100 * sum(number(one.get(name)) or 0.0 for one in some) / len(some) for name in RATIOS]
        names = [*(f"\u2264 {edge:g}" for edge in EDGES), f"> {EDGES[-1]:g}"]
        picture = plots.histogram(list(zip(names, shares, strict=True)), "percent of actions by ratio")
        found.append({"name": f"steps {some[0].get('step')} to {some[-1].get('step')}", "picture": picture})
    return found


def _row(one: dict[str, Any]) -> dict[str, Any]:
    earned = number(one.get("reward"))
    return {
        "prompt": _short(one.get("prompt")),
        "completion": _short(one.get("completion")),
        "reward": "" if earned is None else f"{earned:.2f}",
        "stopped": one.get("stopped") is not False,
    }


def _short(text: Any) -> str:
    plain = str(text or "")
    return plain if len(plain) <= _LONG else f"{plain[:_LONG]} …"
