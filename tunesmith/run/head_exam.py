"""Held-out labelled rows as an exam for a prediction head: the same rows and the same metrics for every model.

It gives what `exam.Exam` gives to those who only read it (questions, references, scores); who sits it is in
`judging_heads.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from tunesmith.core.errors import ConfigError
from tunesmith.core.problem import Problem
from tunesmith.data.dataset import Dataset
from tunesmith.data.encode import Example
from tunesmith.data.labels import label_names, label_numbers
from tunesmith.data.rows import Labelled, Row, Tagged
from tunesmith.evaluate.metrics import OF_PROBLEM, PREDICTED

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.labels import Labels
    from tunesmith.evaluate.predictions import Predictions
    from tunesmith.models.heads import Head
    from tunesmith.models.policy import Policy
    from tunesmith.run.exam import Scores

BASELINE_ROWS = 5000  # of the training rows, that a constant answer is taken from


@dataclass
class HeadExam:
    """Rows with labels, the same for every model.

    Attributes:
        dataset: where the rows come from; it knows the problem.
        metrics: names of `PREDICTED`.
        limit: first rows only.
        examples: the rows that have something to predict; rows[i] is where examples[i] comes from.
    """

    dataset: Dataset
    metrics: tuple[str, ...]
    limit: int | None = None
    examples: list[Example] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_metrics(self.metrics, self.problem)
        self.judged = [PREDICTED.load(name)() for name in self.metrics]
        for place in list(self.dataset.places())[: self.limit]:
            example = self.dataset.example(*place)
            if isinstance(example, Example):
                self.examples.append(example)
                self.rows.append(self.dataset.row(*place))

    @property
    def problem(self) -> Problem:
        """What is to be predicted."""
        assert self.dataset.problem is not None
        return self.dataset.problem

    @property
    def labels(self) -> list[tuple[str, ...]]:
        """The true labels of each row; a score as text."""
        return [tuple(label_names(example.labels, self.problem)) for example in self.examples]

    @property
    def questions(self) -> list[str]:
        """The text of each row, for people."""
        return [_text(row) for row in self.rows]

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The true labels of each row as one line, for people."""
        return [(" ".join(labels),) for labels in self.labels]

    def sit(self, policy: Policy, *, head: Head | None = None, title: str = "predicting") -> tuple[Scores, list[str]]:
        """Scores with intervals, and the predictions as lines of text."""
        from tunesmith.core.progress import progress_bar

        with progress_bar(f"{title} {len(self.examples)} rows", len(self.examples), bytes_=False) as report:
            found = self.predict(policy, head=head, progress=report)
        return self.score(found.labels, found), [" ".join(labels) for labels in found.labels]

    def predict(self, policy: Policy, **more: object) -> Predictions:
        """What a model says of every row; `more` goes to `predictions.predict`."""
        from tunesmith.evaluate.predictions import predict

        return predict(policy, self.examples, self.problem, **more)  # type: ignore[arg-type]

    def score(self, labels: Labels, found: Predictions | None = None) -> Scores:
        """Metrics of labels for all rows, with intervals; those of losses need the predictions that have them."""
        from tunesmith.evaluate.bootstrap import interval

        scores = {}
        for metric in self.judged:
            if metric.needs == "predictions":
                scores[metric.name] = interval(metric, metric.from_labels(labels, self.labels)).as_dict()
            elif found is not None:
                scores[metric.name] = interval(metric, metric.from_losses(found.losses, found.units)).as_dict()
        return scores

    def measure(self, policy: Policy) -> dict[str, float]:
        """The loss and every metric, without intervals, for a run under way."""
        found = self.predict(policy)
        values = {"loss": sum(found.losses) / max(1, sum(found.units))}
        for metric in self.judged:
            if metric.needs == "predictions":
                values[metric.name] = float(metric.value(metric.from_labels(found.labels, self.labels).sum(0)))
        return values

    def constant(self, train: Dataset | None) -> list[tuple[str, ...]]:
        """The commonest label of the training rows (of the exam itself without any), or their mean score, for all."""
        labels = _labels_of(train, self.problem) if train is not None else list(chain.from_iterable(self.labels))
        if self.problem.kind == "regression":
            common = f"{sum(map(float, labels)) / len(labels):.6g}"
        else:
            common = min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]
        return [(common,) * len(row) for row in self.labels]


def check_metrics(names: Sequence[str], problem: Problem, where: str = "evaluate.metrics") -> None:
    """Raises ConfigError for a metric that does not judge such predictions."""
    known = OF_PROBLEM[problem.kind]
    wrong = [name for name in names if name not in known]
    if wrong:
        told = f"{' '.join(wrong)}: not of predictions ({problem.kind}); there are {' '.join(known)}"
        raise ConfigError(told, where=where)


def _labels_of(dataset: Dataset, problem: Problem) -> list[str]:
    found: list[str] = []
    for number, row in enumerate(dataset.rows()):
        if number == BASELINE_ROWS:
            break
        found += label_names(label_numbers(row, problem), problem)
    return found


def _text(row: Row) -> str:
    if isinstance(row, Tagged):
        return " ".join(row.words)
    assert isinstance(row, Labelled)
    return f"{row.text}\n{row.text_pair}" if row.text_pair else row.text
