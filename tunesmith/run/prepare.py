"""Everything that can be said about a run before a weight is loaded: model folder, tokenizer, data, steps.

The one idea: this needs neither torch nor transformers, so that a mistake is found within two seconds. What follows
(planning, tuning, judging) starts from a `Prepared`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config
from tunesmith.core.errors import ConfigError, DataError, ModelError
from tunesmith.core.files import read_json
from tunesmith.core.problem import CLASSES, Comparison, Problem
from tunesmith.core.progress import progress_bar
from tunesmith.data.codec import Codec
from tunesmith.data.dataset import Dataset, open_data
from tunesmith.data.labels import find_labels
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Cursor, Sizes, StepStream, Totals, count_steps
from tunesmith.data.statistics import DataStatistics
from tunesmith.models.folder import position_limit, validate_folder
from tunesmith.models.source import resolve
from tunesmith.parallel.limits import check_model

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
    """

    config: Config
    folder: Path
    codec: Codec
    train: Dataset
    train_statistics: DataStatistics
    eval: Dataset | None = None
    eval_statistics: DataStatistics | None = None
    problem: Problem | None = None

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of steps and micro-batches."""
        names = ("tokens_per_step", "rows_per_step", "micro_batch_tokens", "micro_batch_rows")
        return Sizes(**{name: getattr(self.config.train, name) for name in names})

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
                return count_steps(self.mixture, self.train.example, self.sizes, settings.epochs, report)
        assert settings.steps is not None
        found = self.train_statistics
        mean = found.tokens / max(1, found.kept)
        rows = settings.rows_per_step or max(1.0, (settings.tokens_per_step or mean) / mean)
        return Totals(settings.steps, round(settings.steps * rows), round(settings.steps * rows * mean), {})

    def stream(self, cursor: Cursor) -> Iterator[Any]:
        """The steps from a cursor on."""
        epochs = self.config.train.epochs
        return iter(StepStream(self.mixture, self.train.example, self.sizes, start=cursor, epochs=epochs))

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
        if self.problem is not None:
            return {**found, "predicts": self.problem.as_dict()}
        found["template"] = {"name": self.train.template.name, "sha256": self.train.template.sha256}
        return found


def prepare(config: Config) -> Prepared:
    """Finds and reads everything a run needs but weights.

    Raises: ConfigError, DataError, ModelError, ResourceError; each names file and row or key.
    """
    if not config.data.train:
        raise ConfigError("this key is required", where="data.train", hint="name a file, or a bundled set")
    folder = resolve(config.model)
    validate_folder(folder)
    settings = read_json(folder / "config.json", ModelError)
    config.objective.check(settings)
    config.method.check(settings)
    check_model(config.layout, settings)
    codec = Codec.open(folder)
    asked = config.objective.predicts
    problem = Problem(asked, (), config.train.seed) if asked else None
    taken, compares = config.method.positions, config.objective.compares
    train, train_statistics = read_data(config.data.train, config.data, codec, "data.train", problem, taken, compares)
    problem = train.problem
    if not config.data.eval:
        return Prepared(config, folder, codec, train, train_statistics, problem=problem)
    judged, judged_statistics = read_data(config.data.eval, config.data, codec, "data.eval", problem, taken, compares)
    return Prepared(config, folder, codec, train, train_statistics, judged, judged_statistics, problem)


def read_data(
    parts: Parts,
    section: DataSection,
    codec: Codec,
    where: str,
    problem: Problem | None = None,
    taken: int = 0,
    compares: Comparison | None = None,
) -> tuple[Dataset, DataStatistics]:
    """Opens rows and checks every one of them.

    Args:
        problem: what is to be predicted; one without labels gets those of these rows.
        taken: positions that the method takes from every row.
        compares: which answers of the rows are to be compared.

    Raises DataError naming the setting, the file and the row.
    """
    dataset = open_data(parts, section, codec)
    dataset.problem, dataset.compares = problem, compares
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
