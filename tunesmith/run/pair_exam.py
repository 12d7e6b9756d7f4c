"""Held-out rows of compared answers as an exam: the same pairs and the same metrics for every model.

It gives what `exam.Exam` gives to those who only read it (questions, references, scores); a head is asked for its
scores, a policy for the rewards that it implies. Who sits it is in `judging_pairs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.core.problem import Problem
from tunesmith.data.dataset import Dataset
from tunesmith.data.encode import Example
from tunesmith.data.rows import Compared
from tunesmith.evaluate.answers import Opinions, described, opinions
from tunesmith.evaluate.metrics import COMPARED
from tunesmith.evaluate.metrics.pairs import PairAccuracy, PairLoss, margins
from tunesmith.objectives.dpo import DPO
from tunesmith.objectives.reward import Reward
from tunesmith.run.head_exam import check_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Batch
    from tunesmith.models.heads import Head
    from tunesmith.models.policy import Policy
    from tunesmith.run.exam import Scores

CONSTANT, LONGER = "constant score", "longer answer"


@dataclass
class PairExam:
    """Rows with answers to compare, the same for every model.

    Attributes:
        dataset: where the rows come from.
        metrics: names of `COMPARED`.
        objective: says what a model's scores are, and its loss; a reward model's loss is the plain likelihood.
        limit: first rows only.
        examples: the rows that can be judged; rows[i] is where examples[i] comes from.
    """

    dataset: Dataset
    metrics: tuple[str, ...]
    objective: Reward | DPO = field(default_factory=Reward)
    limit: int | None = None
    examples: list[Example] = field(default_factory=list)
    rows: list[Compared] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_metrics(self.metrics, Problem("reward"))
        self.judged: list[PairAccuracy | PairLoss] = [COMPARED.load(name)() for name in self.metrics]
        for place in list(self.dataset.places())[: self.limit]:
            example = self.dataset.example(*place)
            if isinstance(example, Example):
                row = self.dataset.row(*place)
                assert isinstance(row, Compared)
                self.examples.append(example)
                self.rows.append(row)

    @property
    def questions(self) -> list[str]:
        """The last thing said before each answer, for people."""
        return [row.prompt[-1].text for row in self.rows]

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The best answers of each row, for people."""
        return [
            tuple(turns[-1].text for turns, rank in zip(row.answers, row.ranks, strict=True) if rank == 0)
            for row in self.rows
        ]

    @property
    def lengths(self) -> list[tuple[float, ...]]:
        """Tokens of each answer of each row: the scores of one who likes long answers."""
        return [tuple(float(part.answer_tokens) for part in row.documents()) for row in self.examples]

    def sit(
        self, policy: Policy, *, head: Head | None = None, title: str = "comparing"
    ) -> tuple[Scores, list[str], Opinions]:
        """Scores with intervals, the answer that each row's scores put first, and what the scores are."""
        from tunesmith.core.progress import progress_bar

        with progress_bar(f"{title} {len(self.examples)} rows", len(self.examples), bytes_=False) as report:
            found = opinions(policy, self.examples, lambda who, batch: self._scored(who, batch, head), progress=report)
        return self.score(found.scores, found), self.preferred(found.scores), found

    def score(self, scores: Sequence[Sequence[float]], found: Opinions | None = None) -> Scores:
        """Metrics of scores for all answers, with intervals; the loss needs the opinions that have it."""
        from tunesmith.evaluate.bootstrap import interval

        told = {}
        for metric in self.judged:
            if isinstance(metric, PairAccuracy):
                told[metric.name] = interval(metric, metric.from_margins(self._margins(scores))).as_dict()
            elif found is not None:
                told[metric.name] = interval(metric, metric.from_losses(found.losses, found.units)).as_dict()
        return told

    def preferred(self, scores: Sequence[Sequence[float]]) -> list[str]:
        """The text of the answer with the highest score of each row, the first of equals."""
        return [row.answers[said.index(max(said))][-1].text for row, said in zip(self.rows, scores, strict=True)]

    def describe(self, found: Opinions) -> dict[str, Any]:
        """What a report shows of the scores."""
        return described(found, self.examples)

    def measure(self, policy: Policy) -> dict[str, float]:
        """Loss, accuracy and mean margin, of a policy also the mean log p of its answers, for a run under way."""
        found = opinions(policy, self.examples, lambda who, batch: self._scored(who, batch, None))
        accuracy = PairAccuracy()
        by_row = self._margins(found.scores)
        gaps = [margin for row in by_row for margin in row]
        values = {
            "loss": sum(found.losses) / sum(found.units),
            "accuracy": float(accuracy.value(accuracy.from_margins(by_row).sum(0))),
            "margin": sum(gaps) / max(1, len(gaps)),
        }
        for name, is_best in (("chosen_logp", True), ("rejected_logp", False)):
            chances = [
                chance
                for row, example in zip(found.chances, self.examples, strict=True)
                for chance, rank in zip(row, example.ranks if row else (), strict=True)
                if (rank == 0) is is_best
            ]
            values |= {name: sum(chances) / len(chances)} if chances else {}
        return values

    def _margins(self, scores: Sequence[Sequence[float]]) -> list[list[float]]:
        return [margins(said, example.ranks) for said, example in zip(scores, self.examples, strict=True)]

    def _scored(self, policy: Policy, batch: Batch, head: Head | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if isinstance(self.objective, Reward):
            from tunesmith.models.scores import scores

            # a policy in parts is whole only while it is asked itself
            said = (policy.scores(batch) if head is None else scores(policy, batch, head))[:, 0]
            return said, Reward().losses(said, batch), None
        chances, ratios = self.objective.chances(policy, batch)
        return self.objective.rewards(chances, ratios, batch), self.objective.losses(chances, ratios, batch), chances


def baselines(exam: PairExam) -> list[tuple[str, Scores, list[str]]]:
    """Name, metrics and preferred answers of those that score without a model."""
    flat = [tuple(0.0 for _ in row) for row in exam.lengths]
    return [(name, exam.score(told), exam.preferred(told)) for name, told in ((CONSTANT, flat), (LONGER, exam.lengths))]
