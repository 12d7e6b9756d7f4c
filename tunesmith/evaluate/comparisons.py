"""What judgements say of the systems and of those who judged: wins, strengths, biases, agreement, as one JSON document.

The one idea: a judgement of k answers is the k (k - 1) / 2 pairs in it, and prompts, not pairs, are the independent
evidence. Both bad counts as a tie between systems; skipped counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median
from typing import Any

from tunesmith.core.judged import Judged
from tunesmith.evaluate.agreement import between_groups, between_people, everyone, ratings, with_the_others
from tunesmith.evaluate.bootstrap import Interval
from tunesmith.evaluate.shares import share
from tunesmith.evaluate.strengths import davidson

IMPORTED = (
    "imported"  # the group of judgements that came from elsewhere: in which order answers were shown is not known
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Two answers of different systems in one judgement.

    Attributes:
        first, second: systems, in the order shown.
        result: 1 where the first is better, -1 where the second is, 0 where neither.
        lengths: characters of each.
    """

    prompt: int
    annotator: str
    group: str
    first: str
    second: str
    result: int
    lengths: tuple[int, int]


def outcomes_of(judged: Iterable[Judged]) -> list[Outcome]:
    """Every pair of answers of two systems."""
    found = []
    for one in judged:
        if one.kind == "skip":
            continue
        shown = zip(one.systems, one.texts, one.ranks, strict=True)
        for (first, text, rank), (second, other, its) in combinations(shown, 2):
            if first != second:
                result = (its > rank) - (its < rank)
                lengths = (len(text), len(other))
                found.append(Outcome(one.prompt, one.annotator, one.group, first, second, result, lengths))
    return found


def statistics(judged: Sequence[Judged]) -> dict[str, Any]:
    """Everything: {judgements, pairs, versus, strengths, biases, agreement, annotators, rubric}."""
    outcomes = outcomes_of(judged)
    found = ratings(judged)
    group = {one.annotator: one.group for one in judged}
    people = between_people(found)
    return {
        "judgements": _counts(judged),
        "pairs": len(outcomes),
        "versus": _versus(outcomes),
        "strengths": _strengths(outcomes),
        "biases": biases(outcomes),
        "agreement": {
            **{name: _told(value) for name, value in everyone(found).items()},
            "groups": [
                {"groups": list(both), "tie_discounted": _told(value)}
                for both, value in between_groups(found, group).items()
            ],
            "people": [
                {"annotators": list(both), **{name: _told(value) for name, value in values.items()}}
                for both, values in people.items()
            ],
        },
        "annotators": [
            _annotator(name, [one for one in judged if one.annotator == name], outcomes, with_the_others(found, name))
            for name in group
        ],
        "rubric": _rubric(judged),
    }


def _counts(judged: Sequence[Judged]) -> dict[str, int]:
    kinds = [one.kind for one in judged]
    return {
        "all": len(judged),
        "ranked": kinds.count("ranked"),
        "bad": kinds.count("bad"),
        "skip": kinds.count("skip"),
        "prompts": len({one.prompt for one in judged if one.kind != "skip"}),
        "annotators": len({one.annotator for one in judged}),
    }


def _versus(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of every two systems: win, tie and loss of the first as shares with intervals, and wins with half of the ties."""
    systems = list(dict.fromkeys(sorted({name for one in outcomes for name in (one.first, one.second)})))
    found = []
    for ours, theirs in combinations(systems, 2):
        met = [one for one in outcomes if {one.first, one.second} == {ours, theirs}]
        if not met:
            continue

        def result(one: Outcome, ours: str = ours) -> int:
            return one.result if one.first == ours else -one.result

        row: dict[str, Any] = {"system": ours, "other": theirs, "n": len(met)}
        for name, wanted in (("win", 1), ("tie", 0), ("loss", -1)):
            row[name] = _told(share((one.prompt, float(result(one) == wanted)) for one in met))
        row["win_rate"] = _told(share((one.prompt, (1 + result(one)) / 2) for one in met))
        found.append(row)
    return found


def _strengths(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    fitted = davidson([(one.prompt, one.first, one.second, one.result) for one in outcomes])
    if fitted is None:
        return None
    points = sorted(fitted.elo().items(), key=lambda entry: -entry[1][0])
    return {
        "elo": [{"system": name, "value": value, "low": low, "high": high} for name, (value, low, high) in points],
        "ties": fitted.ties,
        "signature": "Davidson 1970; Elo's scale with mean 1000; robust to what pairs of one prompt have in common",
    }


def biases(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How often, where one of two answers was better, it was the one shown first, and the longer one; 0.5 is none."""
    decided = [one for one in outcomes if one.result]
    known = [one for one in decided if one.group != IMPORTED]
    unequal = [one for one in decided if one.lengths[0] != one.lengths[1]]
    longer = share((one.prompt, float((one.lengths[0] > one.lengths[1]) == (one.result > 0))) for one in unequal)
    return {
        "first_shown": _told(share((one.prompt, float(one.result > 0)) for one in known)),
        "longer": _told(longer),
    }


def _annotator(
    name: str, judged: Sequence[Judged], outcomes: Sequence[Outcome], agreement: Interval | None
) -> dict[str, Any]:
    """Whose judgements these are: how many, how fast, how often undecided, and how far the others agree."""
    own = [one for one in outcomes if one.annotator == name]
    return {
        "annotator": name,
        "group": judged[0].group,
        "judgements": len(judged),
        "skipped": sum(one.kind == "skip" for one in judged),
        "bad": sum(one.kind == "bad" for one in judged),
        "ties": fmean([one.result == 0 for one in own]) if own else None,
        "median_seconds": median(one.seconds for one in judged),
        "with_others": _told(agreement),
        **biases(own),
    }


def _rubric(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """The mean of what each system was given for each criterion."""
    given: dict[tuple[str, str], list[int]] = {}
    for one in judged:
        for criterion, points in one.scores.items():
            for system, value in zip(one.systems, points, strict=True):
                if value is not None:
                    given.setdefault((criterion, system), []).append(value)
    return [
        {"criterion": criterion, "system": system, "mean": fmean(values), "n": len(values)}
        for (criterion, system), values in sorted(given.items())
    ]


def _told(value: Interval | None) -> dict[str, Any] | None:
    """For JSON, which has no NaN: a coefficient that is not defined is None."""
    if value is None or value.value != value.value:
        return None
    return {key: None if found != found else found for key, found in value.as_dict().items()}
