"""One person's judgement of the answers to one prompt, as the store gives it and the statistics take it.

It has no key of a database: what is shown, kept or exported is in `compare`, what is computed in `evaluate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["ranked", "bad", "skip"]


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement.

    Attributes:
        prompt: number of the prompt.
        annotator: who judged.
        group: whose kind they are, as in crowd, author, model.
        kind: `ranked`; `bad`, none of the answers is any good; `skip`, no judgement.
        systems: who wrote the answers, in the order in which they were shown.
        ranks: of each answer, 1 the best, equal ones a tie; all 1 where all are bad, empty where skipped.
        texts: the answers.
        seconds: that it took.
        scores: criterion of the rubric -> points from 1 to 5 of each answer, None where not given.
        comment: what the annotator wrote.
    """

    prompt: int
    annotator: str
    group: str
    kind: Kind
    systems: tuple[str, ...]
    ranks: tuple[int, ...]
    texts: tuple[str, ...]
    seconds: float = 0.0
    scores: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    comment: str = ""
