"""A mixture of sources as rows, dialogues and training examples, through one format and one template each.

The one idea: nothing is held but places; a row is read, converted and encoded when it is asked for, or read as
tokens where an earlier pass has kept it. Reading is in `sources`, converting in `formats`, encoding in `encode`, what
is kept in `token_cache`, order in `order`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from tunesmith.core.errors import DataError, Problems
from tunesmith.core.problem import Comparison, Problem
from tunesmith.data.codec import Codec
from tunesmith.data.encode import NO_ROOM, Dropped, Example, Prompt, encode_row, prompt_ids
from tunesmith.data.encode_answers import encode_compared
from tunesmith.data.formats import convert, format_of
from tunesmith.data.labels import encode_labelled, label_numbers
from tunesmith.data.preview import Preview, previews
from tunesmith.data.rows import Compared, Dialogue, Labelled, Row, Tagged, Text
from tunesmith.data.section import DataSection, Part
from tunesmith.data.sources import Source, open_source
from tunesmith.data.statistics import DataStatistics, row_hash
from tunesmith.data.templates import Template, open_template
from tunesmith.data.token_cache import FEW_ROWS, Keeper, keeping, key_of, open_tokens
from tunesmith.data.token_file import TokenFile, Tokens

DAMAGED = "damaged, or not in its format"
ENCODED_ROWS = 20_000  # rows that a check turns into tokens; conversion is checked for every row
Progress = Callable[[int, int], None]


class Dataset:
    """Rows of one `data.train` or `data.eval`; made by `open_data`.

    Attributes:
        sources: where rows come from; `weights` says how often an epoch sees each.
        formats: the format of each source.
        problem: what is to be predicted of the rows; None where text is learnt.
        compares: which answers of the rows are to be compared; None where none are.
        answered: tokens that the model may write itself after the prompt of a row; 0 where it learns the row's answer.
    """

    problem: Problem | None = None
    compares: Comparison | None = None
    answered: int = 0

    def __init__(self, sources: list[Source], weights: list[float], section: DataSection, codec: Codec) -> None:
        self.sources, self.weights, self.section, self.codec = sources, weights, section, codec
        self.formats = [format_of(source, section.format) for source in sources]
        self._kept: dict[int, TokenFile] = {}  # by source

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [len(source) for source in self.sources]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what each source holds, by its name."""
        return {source.name: source.sha256 for source in self.sources}

    @property
    def template(self) -> Template:
        """What its rows are rendered with; of several sources, what those are that are not bare prompts."""
        return self._plain if set(self.formats) == {"prompt_completion"} else self._chat

    def template_of(self, row: Row) -> Template:
        """The template of one row: bare prompts and completions have none of the model's unless the user names it."""
        return self._plain if isinstance(row, Dialogue) and row.plain else self._chat

    @cached_property
    def _chat(self) -> Template:
        return open_template(self.section.template, self.codec)

    @cached_property
    def _plain(self) -> Template:
        return open_template(self.section.template, self.codec, plain=True)

    def row(self, source: int, row: int) -> Row:
        """One row, converted. Raises DataError naming file and line."""
        raw = self.sources[source][row]
        return convert(raw.data, self.formats[source], raw.where)

    def example(self, source: int, row: int) -> Example | Dropped:
        """One row as tokens, or why it is left out. Raises DataError unless bad rows are to be skipped."""
        kept = self._tokens(source, row)
        if kept is not None:
            return kept
        try:
            return self._encoded(self.row(source, row))
        except DataError as error:
            if not self.section.skip_bad_rows:
                raise
            return Dropped(DAMAGED, error.where)

    def prompt(self, source: int, row: int) -> Prompt | Dropped:
        """One row to be answered, or why it is left out. Raises as `example` and `dialogue`."""
        found = self.example(source, row)
        if isinstance(found, Dropped):
            return found
        return Prompt(list(found.ids), self.dialogue(source, row), self.sources[source][row].data)

    def dialogue(self, source: int, row: int) -> Dialogue:
        """One row as question and answers, for evaluation. Raises DataError for running text and labelled words."""
        found = self.row(source, row)
        if isinstance(found, Tagged):
            raise DataError("labelled words have no question and answer to evaluate", where=found.where)
        if isinstance(found, Text):
            raise DataError("running text has no question and answer to evaluate", where=found.where)
        if isinstance(found, Compared):
            return found.dialogues[0]  # the best answer is the one to be like
        return found.dialogue() if isinstance(found, Labelled) else found

    def places(self) -> Iterator[tuple[int, int]]:
        """(source, row) of every row, in the order of the files."""
        for source, size in enumerate(self.sizes):
            yield from ((source, row) for row in range(size))

    def rows(self) -> Iterator[Row]:
        """Every row that can be read."""
        for source, row in self.places():
            try:
                yield self.row(source, row)
            except DataError:
                continue  # told by `check`

    def dialogues(self, limit: int | None = None) -> Iterator[Dialogue]:
        """The first `limit` rows as questions and answers, without those that are to be skipped."""
        yield from islice(self._dialogues(), limit)

    def prompt_ids(self, dialogue: Dialogue, shots: list[Dialogue] | None = None) -> list[int]:
        """What a model is given to answer it."""
        return prompt_ids(dialogue, self.template_of(dialogue), self.codec, shots or ())

    def describe(self) -> str:
        """One line: names, rows, formats, template."""
        parts = [
            f"{source.name}: {len(source)} rows, format {name}" + (f", weight {weight:g}" if weight != 1 else "")
            for source, name, weight in zip(self.sources, self.formats, self.weights, strict=True)
        ]
        return "; ".join([*parts, self._template_line()])

    def check(self, limit: int = 20, progress: Progress | None = None) -> DataStatistics:
        """Looks at every row and encodes the first twenty thousand; what that gave is kept for the next time.

        Raises DataError with up to `limit` problems, or when there is nothing to learn.
        """
        found, problems, done = DataStatistics(rows=len(self)), Problems(), 0
        for source in range(len(self.sources)):
            for error in self._pass(source, ENCODED_ROWS - done, found):
                if error is not None and not self.section.skip_bad_rows:
                    problems.add(error, keep=limit)
                elif error is not None:
                    found.add(Dropped(DAMAGED, error.where))
                done += 1
                if progress is not None:
                    progress(done, len(self))
        problems.raise_if_any(limit)
        if not found.kept:
            reasons = "; ".join(f"{count} rows: {reason}" for reason, count in found.dropped.most_common())
            text = f"0 trainable rows of {found.examined} in {', '.join(self.hashes)}: {reasons or 'there are none'}"
            raise DataError(text, where="data", hint=self._hint(found))
        return found

    def keep_all(self, progress: Progress | None = None) -> None:
        """Has all rows of a checked dataset as tokens on disk, as far as they can be kept; worth it before epochs."""
        done = 0
        for source, size in enumerate(self.sizes):
            some = source in self._kept and done + size > ENCODED_ROWS
            if some and not self._use(source, key_of(self._facts(source, size))):
                for number, _ in enumerate(self._pass(source, size, DataStatistics())):
                    if progress is not None:
                        progress(done + number + 1, len(self))
            done += size

    def preview(self, count: int) -> list[Preview]:
        """Some kept rows as the model will see them, taken from every source in turn."""
        found: list[Preview] = []
        for row in range(max(self.sizes, default=0)):
            for source in range(len(self.sources)):
                if len({shown.where for shown in found}) == count:
                    return found
                if row < len(self.sources[source]):
                    example = self.example(source, row)
                    found += previews(example, self.codec, self.problem) if isinstance(example, Example) else []
        return found

    @property
    def _is_labelled(self) -> bool:
        return self.problem is not None and self.compares is None

    @property
    def _is_framed(self) -> bool:
        """Whether the tokenizer's own frame takes the place of a template."""
        return self._is_labelled or (self.compares is not None and self.codec.frames_pairs)

    def _encoded(self, row: Row) -> Example | Dropped:
        if self.compares is not None:
            template = None if self.codec.frames_pairs else self.template_of(row)
            return encode_compared(row, template, self.codec, self.section.max_length, self.compares)
        if self.problem is not None:
            return encode_labelled(row, self.codec, self.section.max_length, self.problem)
        if self.answered:
            return self._asked(row)
        return encode_row(row, self.template_of(row), self.codec, self.section.max_length)

    def _asked(self, row: Row) -> Example | Dropped:
        """The prompt of a row alone, with room for what the model writes."""
        if not isinstance(row, Dialogue | Labelled):
            raise DataError("there is no prompt to answer in it", where=row.where, hint="format prompts has some")
        ids = prompt_ids(row, self.template_of(row), self.codec)
        if len(ids) + self.answered > self.section.max_length:
            return Dropped(NO_ROOM, row.where)
        return Example(ids, [False] * len(ids), row.where)

    def _pass(self, source: int, most: int, found: DataStatistics) -> Iterator[DataError | None]:
        """Counts the rows of a source, the first `most` as tokens, and answers what is wrong with each."""
        size = len(self.sources[source])
        most = max(0, min(most, size))
        if size <= FEW_ROWS:
            yield from (self._look(source, row, row < most, found) for row in range(size))
            return
        key = key_of(self._facts(source, most))
        if not self._use(source, key):
            with keeping(key) as keeper:
                yield from (self._look(source, row, row < most, found, keeper) for row in range(size))
            if keeper.made is not None:
                self._kept[source] = keeper.made
            return
        for row, value in enumerate(self._kept[source].hashes()):
            if self._is_labelled or value is None:
                yield self._look(source, row, row < most, found)  # its labels are counted, or it is refused again
                continue
            found.see(value)
            tokens = self._tokens(source, row) if row < most else None
            if tokens is not None:
                found.add(tokens)
            yield None

    def _look(
        self, source: int, row: int, encode: bool, found: DataStatistics, keeper: Keeper | None = None
    ) -> DataError | None:
        """Reads, converts and counts one row, and hands it to the keeper."""
        value, tokens, problem = None, None, None
        try:
            raw = self.sources[source][row]
            converted = convert(raw.data, self.formats[source], raw.where)
            value = row_hash(raw.data)
            found.see(value)
            if self.problem is not None and self._is_labelled:
                found.judge(label_numbers(converted, self.problem), self.problem)
            if encode:
                tokens = self._tokens(source, row) or self._encoded(converted)
                found.add(tokens)
        except DataError as error:
            value, problem = None, error
        if keeper is not None:
            keeper.add(value, tokens)
        return problem

    def _tokens(self, source: int, row: int) -> Tokens:
        kept = self._kept.get(source)
        return None if kept is None else kept.tokens(row, self.sources[source].where(row))

    def _use(self, source: int, key: str) -> bool:
        kept = open_tokens(key, len(self.sources[source]))
        if kept is not None:
            self._kept[source] = kept
        return kept is not None

    def _facts(self, source: int, most: int) -> dict[str, Any]:
        """All that decides what the rows of a source become, beside the code."""
        form = self.formats[source]
        template = None
        if not self._is_framed and form != "text":
            used = self._plain if form == "prompt_completion" else self._chat
            template = [used.sha256, used.own]
        return {
            "rows": self.sources[source].sha256, "encoded": most, "format": form, "template": template,
            "tokenizer": self.codec.sha256, "max_length": self.section.max_length,
            "problem": None if self.problem is None else self.problem.as_dict(), "compares": self.compares,
            "answered": self.answered,
        }  # fmt: skip

    def _dialogues(self) -> Iterator[Dialogue]:
        for source, row in self.places():
            try:
                yield self.dialogue(source, row)
            except DataError:
                if not self.section.skip_bad_rows:
                    raise

    def _template_line(self) -> str:
        if self.problem is not None and self._is_labelled:
            return self.problem.line()
        if self._is_framed:
            return "prompt and answer as two texts"
        if set(self.formats) == {"text"}:
            return "no template"
        folded = " (system messages go into the first user turn)" if self.template.folds_system else ""
        return f"template {self.template.name}{folded}"

    def _hint(self, found: DataStatistics) -> str:
        return f"raise data.max_length above {self.section.max_length}" if found.dropped else ""


def open_data(parts: tuple[Part, ...], section: DataSection, codec: Codec, progress: Progress | None = None) -> Dataset:
    """The dataset of `section.train` or `section.eval`.

    `progress` is called with (bytes read, bytes in all) while a file is indexed. Raises DataError, ConfigError,
    ResourceError.
    """
    sources = [open_source(part.path, progress) for part in parts]
    return Dataset(sources, [part.weight for part in parts], section, codec)
