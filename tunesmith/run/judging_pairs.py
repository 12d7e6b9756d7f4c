"""Who sits an exam of compared answers: a run before and after, beside those who only look at lengths or at nothing.

The files are those of `judging.py`; eval.json also holds what the report shows of the tuned model's scores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.run.judging import Judge
from tunesmith.run.pair_exam import PairExam, baselines

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import Route
    from tunesmith.run.exam import Asked
    from tunesmith.run.prepare import Prepared


class PairJudge(Judge):
    """Sits the exam of compared answers before, during and after a run, and keeps eval.json and samples.jsonl."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        super().__init__(prepared, folder)
        self.pairs: PairExam | None = None
        if prepared.eval is not None:
            objective: Any = prepared.config.objective
            self.pairs = PairExam(prepared.eval, self.section.metrics, objective, self.section.rows)

    @property
    def asked(self) -> Asked | None:
        return self.pairs

    def before(self, loaded: Loaded, route: Route) -> None:
        """The model as received, with a fresh head where there is one, and the two scores that need no model."""
        from tunesmith.models.heads import fresh_head

        exam, problem = self.pairs, self.prepared.problem
        if exam is None or not self.section.metrics or self._recall():
            return
        head = None if problem is None else fresh_head(loaded, problem)
        scores, answers, _ = exam.sit(self._policy(loaded, route), head=head, title="before tuning:")
        self._enter("untuned", scores, answers)
        for name, told, chosen in baselines(exam):
            self._enter(name, told, chosen)
        self._write()

    def during(self, loaded: Loaded, policy: Policy) -> Callable[[int], dict[str, float]]:
        """What the trainer calls every so often."""
        exam = self.pairs
        assert exam is not None
        return lambda step: exam.measure(policy)

    def after(self, loaded: Loaded, route: Route, kind: str) -> None:
        """The tuned model."""
        if self.pairs is None or not self.section.metrics:
            return
        scores, answers, found = self.pairs.sit(self._policy(loaded, route), title="after tuning:")
        self._enter(f"tuned ({kind})", scores, answers)
        self.more = {"pairs": self.pairs.describe(found)}
        self._write()

    def _policy(self, loaded: Loaded, route: Route) -> Policy:
        """A model, and beside it the one that the run received."""
        from tunesmith.models.policy import Policy

        policy = Policy(loaded, route)
        policy.reference = self.received or policy.reference
        return policy
