"""What a model with a prediction head is asked: to choose among labels, to give a number, or to label words.

It crosses every layer (data makes numbers of labels, models have a head for them, metrics read them back), and it is
known before any weight is: this needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tunesmith.core.errors import ModelError

HEAD_SETTINGS = "predict.json"  # in a model's folder: what its head predicts
HEAD_KEY = "tunesmith_predict"  # the same in adapter_config.json
ProblemKind = Literal["classification", "regression", "tokens", "reward"]
CLASSES = ("classification", "tokens")  # kinds that choose among labels
Comparison = Literal["rankings", "pairs", "judged"]
"""Which answers a row has for those that compare: two or more with ranks; two; two, or one that is good or bad."""


@dataclass(frozen=True)
class Problem:
    """One question and its possible answers.

    Attributes:
        kind: one label a document, one number a document, one label a word, or one score an answer.
        labels: their names, in the order of the outputs; none for numbers and scores.
        seed: of the initial values of a head for it.
    """

    kind: ProblemKind
    labels: tuple[str, ...] = ()
    seed: int = 0

    @property
    def outputs(self) -> int:
        """Numbers that a head gives."""
        return len(self.labels) if self.kind in CLASSES else 1

    def as_dict(self) -> dict[str, Any]:
        """What is kept beside a trained head."""
        return {"problem": self.kind, "labels": list(self.labels)}

    def line(self) -> str:
        """In words."""
        if self.kind not in CLASSES:
            return "a number for each text" if self.kind == "regression" else "a score for each answer"
        names = ", ".join(self.labels[:12]) + (" ..." if len(self.labels) > 12 else "")
        each = "text" if self.kind == "classification" else "word"
        return f"one of {len(self.labels)} labels for each {each}: {names}"


def read_problem(found: Any, where: str) -> Problem:
    """A problem from what `as_dict` wrote. Raises ModelError for anything else."""
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    listed: Any = settings.get("labels")
    labels = [label for label in listed if isinstance(label, str)] if isinstance(listed, list) else []
    for kind in get_args(ProblemKind):
        enough = len(set(labels)) == len(labels) >= 2 if kind in CLASSES else not labels
        if settings.get("problem") == kind and labels == listed and enough:
            return Problem(kind, tuple(labels))
    raise ModelError("does not say what the head predicts: {problem, labels}", where=where)
