"""Who sits an exam of labels: a run before and after, and models that `tunesmith evaluate` is given.

Before tuning, the head is a fresh one over the base: what chance gives. The files are those of `judging.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.run.head_exam import HeadExam
from tunesmith.run.judging import CONSTANT, Judge
from tunesmith.run.judging_pairs import PairJudge

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import Route
    from tunesmith.run.exam import Asked
    from tunesmith.run.prepare import Prepared


def judge_of(prepared: Prepared, folder: Path) -> Judge:
    """The judge of a run, by what it learns."""
    if prepared.config.objective.compares is not None:
        return PairJudge(prepared, folder)
    return (Judge if prepared.problem is None else HeadJudge)(prepared, folder)


class HeadJudge(Judge):
    """Sits the exam of labels before, during and after a run, and keeps eval.json and samples.jsonl."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        super().__init__(prepared, folder)
        self.labels: HeadExam | None = None
        if prepared.eval is not None:
            self.labels = HeadExam(prepared.eval, self.section.metrics, self.section.rows)

    @property
    def asked(self) -> Asked | None:
        return self.labels

    def before(self, loaded: Loaded, route: Route) -> None:
        """The base with a fresh head, and the answer that needs no model."""
        from tunesmith.models.heads import fresh_head
        from tunesmith.models.policy import Policy

        exam = self.labels
        if exam is None or not self.section.metrics or self._recall():
            return
        scores, answers = exam.sit(Policy(loaded), head=fresh_head(loaded, exam.problem), title="before tuning:")
        self._enter("untuned", scores, answers)
        constant = exam.constant(self.prepared.train)
        self._enter(CONSTANT, exam.score(constant), [" ".join(labels) for labels in constant])
        self._write()

    def during(self, loaded: Loaded, policy: Policy) -> Callable[[int], dict[str, float]]:
        """What the trainer calls every so often: the loss and every metric."""
        exam = self.labels
        assert exam is not None
        return lambda step: exam.measure(policy)

    def after(self, loaded: Loaded, route: Route, kind: str) -> None:
        """The tuned model."""
        from tunesmith.models.policy import Policy

        if self.labels is None or not self.section.metrics:
            return
        scores, answers = self.labels.sit(Policy(loaded, route), title="after tuning:")
        self._enter(f"tuned ({kind})", scores, answers)
        self._write()
