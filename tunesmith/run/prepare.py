"""Everything that can be said about a run before a weight is loaded: model folder, tokenizer, data, steps.

The one idea: this needs neither torch nor transformers, so that a mistake is found within two seconds. What follows
(planning, tuning, judging) starts from a `Prepared`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config
from tunesmith.core.errors import ConfigError, DataError, ModelError
from tunesmith.core.files import read_json, sha256_file
from tunesmith.core.problem import CLASSES, Comparison, Problem
from tunesmith.core.progress import progress_bar
from tunesmith.data.codec import Codec
from tunesmith.data.dataset import Dataset, open_data
from tunesmith.data.encode import Example
from tunesmith.data.labels import find_labels
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Cursor, Sizes, Step, StepStream, Totals, count_steps
from tunesmith.data.statistics import DataStatistics
from tunesmith.evaluate.rewards import open_rewards
from tunesmith.evaluate.rewards.trained import Trained
from tunesmith.models.folder import position_limit, validate_folder
from tunesmith.models.source import resolve
from tunesmith.objectives.sampled import Sampled
from tunesmith.parallel.limits import check_model
from tunesmith.run.opening import find
from tunesmith.run.starting import check_promise, check_promised_reward, check_start, root_of
from tunesmith.run.teachers import Teacher, find_teacher

if TYPE_CHECKING:
    from tunesmith.data.section import DataSection, Parts

MANY_ROWS = 20_000  # from here on a pass over the rows shows its progress


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have been found and read.

    Attributes:
        config: as the user wrote it, defaults filled in.
        folder: the model's folder.
        codec: its tokenizer.
        train, eval: the rows; eval is None where there are none.
        train_statistics, eval_statistics: what they come to.
        problem: what is to be predicted; None where text is learnt.
        start: the adapter that the run begins with a copy of, where `model` is a run that has one.
        ahead: runs that will be there before this one, by their folders; see `prepare`.
        teacher: who is learnt from, in distillation.
    """

    config: Config
    folder: Path
    codec: Codec
    train: Dataset
    train_statistics: DataStatistics
    eval: Dataset | None = None
    eval_statistics: DataStatistics | None = None
    problem: Problem | None = None
    start: Path | None = None
    ahead: Mapping[str, Config] = field(default_factory=dict)
    teacher: Teacher | None = None

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of steps and micro-batches; in completions, where the model writes some for each row."""
        names = ("tokens_per_step", "rows_per_step", "micro_batch_tokens", "micro_batch_rows")
        asked = {name: getattr(self.config.train, name) for name in names}
        count = self.config.objective.completions
        return Sizes(**{name: None if size is None else size * count for name, size in asked.items()})

    @cached_property
    def read_sizes(self) -> Sizes:
        """How many rows are read at a time: those of a step, or of all updates that use the completions once."""
        objective, rows = self.config.objective, self.config.train.rows_per_step
        if not objective.samples:
            return self.sizes
        assert rows is not None
        return Sizes(rows_per_step=rows * objective.parts)

    @property
    def example(self) -> Callable[[int, int], Any]:
        """A row as what steps are made of: tokens to learn, or a prompt to answer."""
        return self.train.prompt if self.config.objective.samples else self.train.example

    @cached_property
    def mixture(self) -> Mixture:
        """The order of the training rows."""
        return Mixture(self.train.sizes, self.train.weights, self.config.train.seed)

    @cached_property
    def totals(self) -> Totals:
        """Steps, rows and tokens of the whole run; exact where epochs are asked for, else from the average row."""
        settings = self.config.train
        if settings.epochs is not None:
            with progress(len(self.train), "encoding rows") as report:
                self.train.keep_all(report)  # counting and every epoch then read them
            with progress(len(self.train) * settings.epochs, "counting steps") as report:
                return self._written(count_steps(self.mixture, self.example, self.read_sizes, settings.epochs, report))
        assert settings.steps is not None
        found = self.train_statistics
        mean = found.tokens / max(1, found.kept)
        rows = self.sizes.rows_per_step or max(1.0, (settings.tokens_per_step or mean) / mean)
        mean += self.config.objective.answered
        return Totals(settings.steps, round(settings.steps * rows), round(settings.steps * rows * mean), {})

    def _written(self, read: Totals) -> Totals:
        """The same in updates and in the longest completions, where rows are prompts."""
        objective = self.config.objective
        if not objective.samples:
            return read
        rows = read.rows * objective.completions * objective.passes
        tokens = read.tokens * objective.completions * objective.passes + rows * objective.answered
        return Totals(read.steps * objective.passes * objective.parts, rows, tokens, read.dropped)

    def planned(self, step: Step[Any]) -> Step[Any]:
        """A step of `stream` as a plan counts it: the first update, its completions as long as they may be."""
        objective = self.config.objective
        if not objective.samples:
            return step
        prompts = [row for rows in step.micro_batches for row in rows][: self.config.train.rows_per_step]
        longest = objective.answered
        rows = [
            Example([*prompt.ids, *[0] * longest], [False] * len(prompt.ids) + [True] * longest)
            for prompt in prompts
            for _ in range(objective.completions)
        ]
        return replace(step, micro_batches=[rows])

    def stream(self, cursor: Cursor) -> Iterator[Any]:
        """The steps from a cursor on."""
        epochs = self.config.train.epochs
        return iter(StepStream(self.mixture, self.example, self.read_sizes, start=cursor, epochs=epochs))

    def lines(self) -> list[str]:
        """What a person wants to know first."""
        found = [f"model: {self.config.model}", f"train: {self.train.describe()}", f"  {self.train_statistics.line()}"]
        if self.eval is not None and self.eval_statistics is not None:
            found += [f"eval:  {self.eval.describe()}", f"  {self.eval_statistics.line()}"]
            shared = self.train_statistics.shared_with(self.eval_statistics)
            if shared:
                found.append(f"warning: {shared} rows of the eval data are in the training data, too")
        return found

    def data_facts(self) -> dict[str, Any]:
        """Statistics and hashes for run.json and `check --json`."""
        found: dict[str, Any] = {"train": {**self.train_statistics.as_json(), "sha256": self.train.hashes}}
        if self.eval is not None and self.eval_statistics is not None:
            found["eval"] = {**self.eval_statistics.as_json(), "sha256": self.eval.hashes}
        found |= {name: {"sha256": hashes} for name, hashes in self._hashes().items() if hashes}
        if self.problem is not None:
            return {**found, "predicts": self.problem.as_dict()}
        found["template"] = {"name": self.train.template.name, "sha256": self.train.template.sha256}
        return found

    def _hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of what else a run depends on, by file: the adapter it begins with, functions that reward."""
        start = {} if self.start is None else {str(self.start): sha256_file(self.start / "adapter_model.safetensors")}
        objective = self.config.objective
        rewards = open_rewards(objective.reward) if isinstance(objective, Sampled) else []
        teacher = {} if self.teacher is None else self.teacher.hashes()
        rewarding = {file: sha256_file(file) for one in rewards for file in one.files}
        return {"start": start, "teacher": teacher, "rewards": rewarding}


def prepare(config: Config, ahead: Mapping[str, Config] | None = None) -> Prepared:
    """Finds and reads everything a run needs but weights.

    Args:
        ahead: runs that will be there before this one begins, by their folders; what they leave behind is not asked
            for. What is prepared so can be looked at and planned, not run.

    Raises: ConfigError, DataError, ModelError, ResourceError; each names file and row or key.
    """
    ahead = ahead or {}
    if not config.data.train:
        raise ConfigError("this key is required", where="data.train", hint="name a file, or a bundled set")
    named = find(root_of(config.model, ahead))
    folder = resolve(named.model)
    validate_folder(folder)
    if config.model in ahead:
        check_promise(config, ahead[config.model])
        named = replace(named, adapter=None)
    if named.adapter is not None:
        check_start(config, named.adapter)
    _check_rewards(config, ahead)
    settings = read_json(folder / "config.json", ModelError)
    config.objective.check(settings)
    config.method.check(settings)
    check_model(config.layout, settings)
    codec = Codec.open(folder)
    teacher = find_teacher(config, folder, codec, ahead)
    asked = config.objective.predicts
    problem = Problem(asked, (), config.train.seed) if asked else None
    taken, compares, answered = config.method.positions, config.objective.compares, config.objective.answered
    train, train_statistics = read_data(
        config.data.train, config.data, codec, "data.train", problem, taken, compares, answered
    )
    problem, start, judged, judged_statistics = train.problem, named.adapter, None, None
    if config.data.eval:
        judged, judged_statistics = read_data(
            config.data.eval, config.data, codec, "data.eval", problem, taken, compares
        )
    return Prepared(
        config, folder, codec, train, train_statistics, judged, judged_statistics, problem, start, ahead, teacher
    )


def _check_rewards(config: Config, ahead: Mapping[str, Config]) -> None:
    """Raises ConfigError where a reward model is not there, and will not be."""
    objective = config.objective
    for reward in open_rewards(objective.reward) if isinstance(objective, Sampled) else []:
        if isinstance(reward, Trained) and reward.run in ahead:
            check_promised_reward(config, reward.run, ahead)
        else:
            reward.check_there()


def read_data(
    parts: Parts,
    section: DataSection,
    codec: Codec,
    where: str,
    problem: Problem | None = None,
    taken: int = 0,
    compares: Comparison | None = None,
    answered: int = 0,
) -> tuple[Dataset, DataStatistics]:
    """Opens rows and checks every one of them.

    Args:
        problem: what is to be predicted; one without labels gets those of these rows.
        taken: positions that the method takes from every row.
        compares: which answers of the rows are to be compared.
        answered: tokens that the model may write after the prompt of every row; 0 where it learns the row's answer.

    Raises DataError naming the setting, the file and the row.
    """
    dataset = open_data(parts, section, codec)
    dataset.problem, dataset.compares, dataset.answered = problem, compares, answered
    if problem is not None and not problem.labels:
        dataset.problem = find_labels(dataset.rows(), problem.kind, problem.seed)
    with progress(len(dataset), f"reading {where}") as report:
        found = dataset.check(progress=report)
    if dataset.problem is not None and dataset.problem.kind in CLASSES and dataset.problem.outputs < 2:
        told = f"every row has the same label, {dataset.problem.labels[0]!r}: there is nothing to tell apart"
        raise DataError(told, where=where)
    _check_positions(found, section, codec.folder, where, taken)
    return dataset, found


def _check_positions(found: DataStatistics, section: DataSection, folder: Path, where: str, taken: int) -> None:
    limit = position_limit(read_json(folder / "config.json", ModelError))
    if limit is None or section.max_length <= limit - taken:
        return
    if found.longest_tokens > limit - taken or found.examined < found.rows:
        used = f", of which the method takes {taken}" if taken else ""
        longest = min(section.max_length, found.longest_tokens)
        raise ConfigError(
            f"rows of up to {longest} tokens; the model has {limit} positions{used}",
            where=where,
            hint=f"set data.max_length (--max-length) to at most {limit - taken}",
        )


def progress(total: int, title: str) -> Any:
    """A progress bar where there is enough to do; yields None where there is not."""
    return progress_bar(title, total, bytes_=False) if total > MANY_ROWS else nullcontext()
