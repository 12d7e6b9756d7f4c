"""Who sits an exam: a run before and after, or any models side by side; and the files that keep the answers."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import CheckpointError, ConfigError
from tunesmith.core.files import canonical_json, read_json, write_atomic
from tunesmith.data.section import DataSection
from tunesmith.evaluate.metrics import COMPARED
from tunesmith.evaluate.section import EvaluateSection, metric_names
from tunesmith.objectives.dpo import DPO
from tunesmith.run.exam import Asked, Exam, Scores, choose_shots, constant_answers, samples
from tunesmith.run.head_exam import HeadExam, check_metrics
from tunesmith.run.pair_exam import PairExam, baselines

if TYPE_CHECKING:
    from tunesmith.core.problem import Comparison, Problem
    from tunesmith.data.codec import Codec
    from tunesmith.data.dataset import Dataset
    from tunesmith.data.encode import Prompt
    from tunesmith.data.rows import Dialogue
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import Route
    from tunesmith.run.opening import Opened, Seen
    from tunesmith.run.prepare import Prepared
    from tunesmith.run.teaching import Teaching

log = logging.getLogger(__name__)
AnyExam = Exam | HeadExam | PairExam
CONSTANT, COPY = "constant answer", "copy of the prompt"
MAX_LENGTH = 1024


class Judge:
    """Sits the exam before, during and after a run, and keeps eval.json and samples.jsonl.

    Without data.eval or metrics it does nothing but the loss during training.

    Attributes:
        received: the model as the run received it; None where that is the base.
        earned: the mean reward of an answer to each of some prompts, where a run learns from one.
    """

    received: Route | None = None
    earned: Callable[[Sequence[Prompt], Sequence[str]], float] | None = None

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.prepared, self.folder = prepared, folder
        self.section: EvaluateSection = prepared.config.evaluate
        self.models: list[dict[str, Any]] = []
        self.answers: dict[str, list[str]] = {}
        self.more: dict[str, Any] = {}  # beside the models in eval.json
        self.exam: Exam | None = None
        if prepared.eval is not None and prepared.problem is None and prepared.config.objective.compares is None:
            section = self.section
            samples = prepared.config.objective.samples
            self.exam = Exam(prepared.eval, section.metrics, section.generate, section.rows, asks=samples)

    def taught_by(self, teaching: Teaching) -> None:
        """Has a teacher say how far a model is from it."""
        if self.exam is not None:
            self.exam.teacher = teaching.distances

    def before(self, loaded: Loaded, route: Route) -> None:
        """The untuned model, with and without solved examples, and the two answers that need no model.

        Args:
            route: of the model as the run received it.
        """
        if self.exam is None or not self.section.metrics or self._recall():
            return
        exam, codec = self.exam, self.prepared.codec
        scores, answers = exam.sit(loaded, route, codec, title="before tuning:")
        self._enter("untuned", scores, answers)
        if exam.spoken:
            if self.section.shots:
                shots = choose_shots(self.prepared.train, self.section.shots, exam.dialogues)
                scores, answers = exam.sit(loaded, route, codec, shots, title=f"with {len(shots)} examples:")
                self._enter(f"untuned, {len(shots)} shots", scores, answers)
            constant = constant_answers(exam, self.prepared.train)
            self._enter(CONSTANT, exam.score(constant), constant)
            self._enter(COPY, exam.score(exam.questions), exam.questions)
        self._write()

    def during(self, loaded: Loaded, policy: Policy) -> Callable[[int], dict[str, float]]:
        """What the trainer calls every so often: the loss, the metric it may stop on, and what answers earn."""
        assert self.exam is not None
        exam, stop, earned = self.exam, self.prepared.config.train.stop, self.earned
        spoken = stop is not None and stop.metric in {metric.name for metric in exam.spoken}
        prompts = exam.prompts if earned is not None else []

        def measure(step: int) -> dict[str, float]:
            totals, tokens = exam.row_losses(policy)
            found = {"loss": sum(totals) / max(1, sum(tokens))}
            for metric in exam.measured:
                found[metric.name] = float(metric.value(metric.from_losses(totals, tokens).sum(0)))
            if exam.teacher is not None:
                totals, tokens = exam.row_distances(policy)
                found["divergence"] = sum(totals) / max(1, sum(tokens))
            if spoken or earned is not None:
                answers = exam.write(loaded, policy.route, self.prepared.codec, title=f"step {step}:")
                found |= {name: score["value"] for name, score in exam.score(answers).items()}
                if earned is not None:
                    found["reward"] = earned(prompts, answers)
            return found

        return measure

    def after(self, loaded: Loaded, route: Route, kind: str) -> None:
        """The tuned model."""
        if self.exam is None or not self.section.metrics:
            return
        scores, answers = self.exam.sit(loaded, route, self.prepared.codec, title="after tuning:")
        self._enter(f"tuned ({kind})", scores, answers)
        self._write()

    def print_table(self) -> None:
        """The table of all models on stderr."""
        if self.models:
            from rich.console import Console

            from tunesmith.evaluate.table import metrics_table, table_width

            Console(stderr=True, highlight=False, width=table_width(sys.stderr)).print(
                metrics_table({"models": self.models})
            )

    def _enter(self, name: str, scores: Scores, answers: list[str]) -> None:
        self.models = [model for model in self.models if model["name"] != name]
        self.models.append({"name": name, "metrics": scores})
        self.answers[name] = answers

    def _recall(self) -> bool:
        """Takes what was judged before an interruption; False where nothing was."""
        path = self.folder / "eval.json"
        if not path.exists():
            return False
        try:
            models = read_json(path, CheckpointError)["models"]
            lines = (self.folder / "samples.jsonl").read_text("utf-8").splitlines()
            answers = [json.loads(line)["base"] for line in lines]
            self.models = [{"name": model["name"], "metrics": model["metrics"]} for model in models]
        except (CheckpointError, FileNotFoundError, ValueError, KeyError, TypeError):
            # nothing but what can be measured again is lost
            log.warning("%s or samples.jsonl beside it is damaged: judging the untuned model again", path)
            return False
        self.answers["untuned"] = answers
        return True

    @property
    def asked(self) -> Asked | None:
        """The exam, whatever it is like."""
        return self.exam

    def _write(self) -> None:
        assert self.asked is not None
        columns = {"base": self.answers.get("untuned", [])}
        columns["tuned"] = next((found for name, found in self.answers.items() if name.startswith("tuned")), [])
        lines = samples(self.asked, columns)
        write_atomic(self.folder / "samples.jsonl", "".join(lines))
        write_atomic(self.folder / "eval.json", canonical_json({"models": self.models, **self.more}, indent=1) + "\n")


@dataclass(frozen=True)
class Question:
    """What `tunesmith evaluate` asks; each field is one of its options.

    `max_length` None is the longest of the runs that are asked, and MAX_LENGTH where none is a run.
    """

    data: str
    metrics: tuple[str, ...]
    max_new_tokens: int = 64
    rows: int | None = None
    shots: int = 0
    shots_from: str | None = None
    baselines: bool = False
    data_format: str = "auto"
    template: str = "auto"
    max_length: int | None = None
    precision: str = "auto"

    def dataset(
        self,
        source: str,
        codec: Codec,
        template: str,
        problem: Problem | None = None,
        compares: Comparison | None = None,
    ) -> Dataset:
        """Rows of `source` for a tokenizer, with labels for a problem, or with answers that are compared.

        Raises DataError, ConfigError.
        """
        from tunesmith.run.prepare import read_data

        length = self.max_length if self.max_length is not None else MAX_LENGTH
        settings = {"eval": source, "format": self.data_format, "template": template, "max_length": length}
        section = DataSection.model_validate(settings)
        return read_data(section.eval, section, codec, "--data", problem, compares=compares)[0]


def judge_models(sources: list[str], question: Question, out: str | None = None) -> dict[str, Any]:
    """Several models side by side: {models: [{name, metrics}]}; with `out` also eval.json and samples.jsonl there.

    Raises: ConfigError, DataError, ModelError.
    """
    from tunesmith.run.folder import check_writable
    from tunesmith.run.opening import look, open_model

    try:
        metrics = metric_names(question.metrics)
    except ValueError as error:
        raise ConfigError(str(error), where="--metrics") from error
    if not metrics:
        raise ConfigError(
            "names none", where="--metrics", hint="as in --metrics loss,bleu; see `tunesmith evaluate -h`"
        )
    if out is not None:
        check_writable(Path(out))
    if "divergence" in metrics:
        hint = "a run of objective: distill measures it, before and after"
        raise ConfigError("divergence is from a teacher, and there is none", where="--metrics", hint=hint)
    seen = [look(source, template=question.template) for source in sources]
    if question.max_length is None:  # one for all, so that all are asked the same
        lengths = [one.named.max_length for one in seen if one.named.max_length is not None]
        question = replace(question, max_length=max(lengths, default=None))
    exams = [_exam(question, one, metrics) for one in seen]  # what is wrong is told before any model is loaded
    models: list[dict[str, Any]] = []
    columns: dict[str, list[str]] = {}
    exam: AnyExam | None = None
    for source, one, (exam, shots) in zip(sources, seen, exams, strict=True):
        opened = open_model(one, precision=question.precision)
        scores, answers = _sit(exam, opened, shots, f"{source}:")
        name = f"{source}, {question.shots} shots" if shots else source
        models.append({"name": name, "metrics": scores})
        columns[name] = answers
    for name, scores, answers in _baselines(exam) if question.baselines and exam is not None else ():
        models.append({"name": name, "metrics": scores})
        columns[name] = answers
    if out is not None and exam is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "eval.json", canonical_json({"models": models}, indent=1) + "\n")
        write_atomic(folder / "samples.jsonl", "".join(samples(exam, columns)))
    return {"models": models}


def _sit(exam: AnyExam, opened: Opened, shots: list[Dialogue], title: str) -> tuple[Scores, list[str]]:
    """One model's scores and answers, as its kind of exam has them."""
    from tunesmith.models.policy import Policy

    if isinstance(exam, PairExam):
        return exam.sit(Policy(opened.loaded, opened.route), title=title)[:2]
    if isinstance(exam, HeadExam):
        return exam.sit(Policy(opened.loaded, opened.route), title=title)
    return exam.sit(opened.loaded, opened.route, opened.codec, shots, title=title)


def _baselines(exam: AnyExam) -> list[tuple[str, Scores, list[str]]]:
    """Name, scores and answers of what needs no model."""
    if isinstance(exam, PairExam):
        return baselines(exam)
    if isinstance(exam, HeadExam):
        constant = exam.constant(None)
        return [(CONSTANT, exam.score(constant), [" ".join(labels) for labels in constant])]
    found = ((CONSTANT, constant_answers(exam, None)), (COPY, exam.questions)) if exam.spoken else ()
    return [(name, exam.score(answers), answers) for name, answers in found]


def _exam(question: Question, seen: Seen, metrics: tuple[str, ...]) -> tuple[AnyExam, list[Dialogue]]:
    """The exam and the solved examples as one model reads them."""
    if seen.problem is not None:
        check_metrics(metrics, seen.problem, "--metrics")
        if question.shots:
            raise ConfigError("no effect on a model that predicts labels", where="--shots", hint="leave it out")
        if seen.problem.kind == "reward":
            pairs = question.dataset(question.data, seen.codec, seen.chosen, seen.problem, "rankings")
            return PairExam(pairs, metrics, limit=question.rows), []
        rows = question.dataset(question.data, seen.codec, "auto", seen.problem)
        return HeadExam(rows, metrics, question.rows), []
    seen.check_writes()
    if seen.named.objective.get("kind") == "dpo" and not question.shots and set(metrics) <= set(COMPARED.table):
        policy = DPO.model_validate(seen.named.objective)
        pairs = question.dataset(question.data, seen.codec, seen.chosen, None, policy.compares)
        return PairExam(pairs, metrics, policy, question.rows), []
    rows = question.dataset(question.data, seen.codec, seen.chosen)
    exam = Exam(rows, metrics, question.max_new_tokens, question.rows)
    if not question.shots:
        return exam, []
    if not exam.spoken:
        told = f"no effect on {' '.join(metrics)}, which are measured without solved examples"
        raise ConfigError(told, where="--shots", hint="add a metric of written answers, as exact_match, to --metrics")
    solved = question.dataset(question.shots_from or question.data, seen.codec, seen.chosen)
    return exam, choose_shots(solved, question.shots, exam.dialogues)
