"""Held-out rows as an exam: the same questions and the same metrics for every model that sits it.

The one idea: an `Exam` is fixed before any model sees it (rows, prompts, references), so that every row of a table
answers the same questions. Who sits it, and what is kept, is in `judging.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.core.errors import ConfigError
from tunesmith.core.files import canonical_json
from tunesmith.data.codec import Codec
from tunesmith.data.dataset import Dataset
from tunesmith.data.encode import Example, Prompt
from tunesmith.data.rows import Dialogue
from tunesmith.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import Route

Scores = dict[str, dict[str, Any]]


@dataclass
class Exam:
    """Questions that are the same for every model.

    Attributes:
        dataset: where the rows come from.
        metrics: names.
        max_new_tokens: of an answer.
        limit: first rows only.
        asks: whether answers are wanted without a metric of them, too.
        dialogues: the rows as questions, those with the same prompt as one with several references.
        teacher: says how far a policy is from it on rows, where there is one.
    """

    dataset: Dataset
    metrics: tuple[str, ...]
    max_new_tokens: int
    limit: int | None = None
    asks: bool = False
    dialogues: list[Dialogue] = field(default_factory=list)
    teacher: Callable[[Policy, list[Example]], tuple[list[float], list[int]]] | None = None

    def __post_init__(self) -> None:
        metrics = [METRICS.load(name)() for name in self.metrics]
        self.spoken = [metric for metric in metrics if metric.needs not in ("losses", "teacher")]
        self.measured = [metric for metric in metrics if metric.needs == "losses"]
        self.compared = [metric for metric in metrics if metric.needs == "teacher"]
        for metric in metrics:
            metric.require()
        if self.spoken or self.asks:
            self.dialogues = grouped(list(self.dataset.dialogues(None)))[: self.limit]
        for metric in self.spoken:
            if metric.reads_tables:
                metric.tables = [dialogue.table for dialogue in self.dialogues]

    @property
    def references(self) -> list[tuple[str, ...]]:
        """Acceptable answers of each question."""
        return [dialogue.answers for dialogue in self.dialogues]

    @property
    def questions(self) -> list[str]:
        """The last thing said before each answer, for people."""
        return [dialogue.prompt[-1].text if dialogue.prompt else "" for dialogue in self.dialogues]

    @property
    def prompts(self) -> list[Prompt]:
        """The questions as a reward sees them, each with the data of its first row."""
        sources = self.dataset.sources
        data = {raw.where: raw.data for source, row in self.dataset.places() for raw in [sources[source][row]]}
        return [Prompt(self.dataset.prompt_ids(one), one, data[one.where]) for one in self.dialogues]

    def score(self, completions: Sequence[str]) -> Scores:
        """Metrics of answers to all questions, with intervals."""
        from tunesmith.evaluate.bootstrap import interval

        found = {}
        for metric in self.spoken:
            found[metric.name] = interval(metric, metric.statistics(completions, self.references)).as_dict()
        return found

    def losses(self, policy: Policy) -> Scores:
        """Loss metrics of the rows as they would be trained on."""
        from tunesmith.evaluate.bootstrap import interval

        found: Scores = {}
        for metrics, rows_of in ((self.measured, self.row_losses), (self.compared, self.row_distances)):
            rows = rows_of(policy) if metrics else ([], [])
            found |= {metric.name: interval(metric, metric.from_losses(*rows)).as_dict() for metric in metrics}
        return found

    def row_losses(self, policy: Policy) -> tuple[list[float], list[int]]:
        """Summed negative log-likelihood and supervised tokens of each row that can be learnt from."""
        from tunesmith.evaluate.losses import row_losses

        return row_losses(policy, self._examples())

    def row_distances(self, policy: Policy) -> tuple[list[float], list[int]]:
        """Summed distance from the teacher and supervised tokens of each row."""
        assert self.teacher is not None
        return self.teacher(policy, self._examples())

    def _examples(self) -> list[Example]:
        found = (self.dataset.example(*place) for place in list(self.dataset.places())[: self.limit])
        return [example for example in found if isinstance(example, Example)]

    def write(
        self, loaded: Loaded, route: Route, codec: Codec, shots: Sequence[Dialogue] = (), title: str = "answering"
    ) -> list[str]:
        """A model's answers, greedy; what all prompts begin with is read once."""
        from tunesmith.core.progress import progress_bar
        from tunesmith.models.generate import generate

        prompts = [self.dataset.prompt_ids(dialogue, list(shots)) for dialogue in self.dialogues]
        shared = common_prefix(prompts)
        stops = self.dataset.template_of(self.dialogues[0]).stop_ids
        with progress_bar(f"{title} {len(prompts)} questions", len(prompts), bytes_=False) as report:
            answers = generate(
                loaded,
                route,
                [prompt[len(shared) :] for prompt in prompts],
                max_new_tokens=self.max_new_tokens,
                stop_ids=set(stops),
                shared_prefix=shared,
                progress=report,
            )
        return [codec.decode(answer.ids).strip() for answer in answers]

    def sit(
        self, loaded: Loaded, route: Route, codec: Codec, shots: Sequence[Dialogue] = (), title: str = "answering"
    ) -> tuple[Scores, list[str]]:
        """Everything the exam asks of a model: scores and answers."""
        from tunesmith.models.policy import Policy

        scores = self.losses(Policy(loaded, route)) if not shots else {}
        answers = self.write(loaded, route, codec, shots, title) if self.spoken else []
        return {**(self.score(answers) if answers else {}), **scores}, answers


def grouped(dialogues: list[Dialogue]) -> list[Dialogue]:
    """Questions in the order of the rows, each once, with the answers of all rows that ask it."""
    found: dict[tuple[Any, ...], list[Dialogue]] = {}
    for dialogue in dialogues:
        found.setdefault((*dialogue.prompt, dialogue.table), []).append(dialogue)
    return [_joined(same) for same in found.values()]


def _joined(same: list[Dialogue]) -> Dialogue:
    if len(same) == 1:
        return same[0]
    answers = tuple(dict.fromkeys(answer for dialogue in same for answer in dialogue.answers))
    first = same[0]
    return Dialogue(first.messages, first.where, first.plain, answers, first.table)


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with, short of the last token of the shortest."""
    if len(prompts) < 2:
        return []
    low, high = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: min(same, min(map(len, prompts)) - 1)]


def choose_shots(dataset: Dataset, count: int, taken: Sequence[Dialogue] = ()) -> list[Dialogue]:
    """The first rows whose question is not among `taken` and whose length is not above the median: solved examples."""
    asked = {dialogue.prompt for dialogue in taken}
    found = [dialogue for dialogue in dataset.dialogues(200) if dialogue.prompt not in asked]
    if len(found) < count:
        raise ConfigError(f"asks for {count} solved examples, there are {len(found)}", where="evaluate.shots")
    sizes = sorted(_size(dialogue) for dialogue in found)
    middle = sizes[len(sizes) // 2]
    short = [dialogue for dialogue in found if _size(dialogue) <= middle]
    return short[:count]


def _size(dialogue: Dialogue) -> int:
    return sum(len(message.text) for message in dialogue.messages)


def constant_answers(exam: Exam, train: Dataset | None) -> list[str]:
    """The commonest answer of the training rows (of the exam itself without any), for every question."""
    answers = [dialogue.completion for dialogue in train.dialogues(5000)] if train else []
    answers = answers or [dialogue.completion for dialogue in exam.dialogues]
    return [Counter(answers).most_common(1)[0][0]] * len(exam.dialogues)


class Asked(Protocol):
    """An exam as those see it who only read it."""

    @property
    def questions(self) -> list[str]: ...

    @property
    def references(self) -> list[tuple[str, ...]]: ...


def samples(exam: Asked, columns: dict[str, list[str]]) -> list[str]:
    """Lines of samples.jsonl: question, references and the answers of each column."""
    lines = []
    for number, (question, references) in enumerate(zip(exam.questions, exam.references, strict=True)):
        row: dict[str, Any] = {"prompt": question, "references": list(references)}
        # a model of another kind may have left out rows that this one can read
        row |= {name: answers[number] for name, answers in columns.items() if len(answers) == len(exam.questions)}
        lines.append(canonical_json(row) + "\n")
    return lines
