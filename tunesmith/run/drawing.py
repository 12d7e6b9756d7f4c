"""Rows that a model writes: answers to the prompts of a data set, one each or the best of several, kept as a file.

The one idea: a chunk of prompts is answered whole and kept at once, and what is drawn depends on (seed, chunk) alone,
so that a command that was cut goes on where it was and ends with the same file. These are rows to tune on: what a
teacher writes (sequence-level distillation) or what a reward likes best (rejection sampling).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.core.files import canonical_json, os_error, sha256_file, write_atomic
from tunesmith.core.progress import progress_bar
from tunesmith.core.rng import seed_for
from tunesmith.core.yaml import read_yaml_text
from tunesmith.data.dataset import Dataset
from tunesmith.data.encode import Example, Prompt
from tunesmith.data.rows import Dialogue
from tunesmith.data.section import DataSection
from tunesmith.evaluate.best_of import divergence_bound, expected_best
from tunesmith.evaluate.rewards import open_rewards
from tunesmith.evaluate.rewards.trained import Trained
from tunesmith.models.folder import fingerprint
from tunesmith.objectives.sampled import Rewards
from tunesmith.run.folder import check_writable
from tunesmith.run.opening import Opened, Seen, look, open_model
from tunesmith.run.prepare import read_data

CHUNK = 8  # prompts that are answered, and kept, together
PROMPT_TOKENS = 1024  # of the longest prompt that is answered


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn, and which are kept.

    Attributes:
        samples: answers of each prompt.
        rewards: sections of rewards that add up; empty where nothing is judged.
        above: keeps every answer that earns so much; None keeps the best of each prompt, the first of equal ones.
    """

    samples: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    rewards: tuple[dict[str, Any], ...] = ()
    above: float | None = None

    def check(self) -> None:
        """Raises ConfigError where settings have no effect, or a reward is not there."""
        if self.samples > 1 and not self.rewards:
            raise ConfigError("the best of several needs a reward to tell", where="--best-of", hint="--reward R")
        if self.samples > 1 and not self.temperature:
            raise ConfigError("all samples are the same at temperature 0", where="--best-of", hint="--temperature 1")
        if self.above is not None and not self.rewards:
            raise ConfigError("has no effect without a reward", where="--above", hint="--reward R")
        for reward in open_rewards(self.rewards, "--reward"):
            reward.check_there()


@dataclass(frozen=True)
class Drawn:
    """One answer: its text, its tokens, what it earned."""

    text: str
    tokens: int
    reward: float


def read_rewards(texts: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Sections of rewards from words of the command line. Raises ConfigError."""
    if not texts:
        return ()
    try:
        return TypeAdapter(Rewards).validate_python([read_yaml_text(text, "--reward") for text in texts])
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(told, where="--reward", hint="as objective.reward has it") from error


def draw_rows(source: str, data: str, out: str, drawing: Drawing, rows: int | None, template: str) -> dict[str, Any]:
    """Has a model answer the prompts of a data set, and writes the answers that are kept as rows of `out`.

    Args:
        rows: only the first so many.

    Returns:
        {out, prompts, kept, samples, best_of: [{n, reward, divergence_bound}]}; the last empty without a reward.

    Raises: ConfigError, DataError, ModelError, ResourceError; what was answered stays in `out`.part.
    """
    drawing.check()
    path, part = Path(out), Path(f"{out}.part")
    check_writable(path.parent)
    if path.exists():
        raise ConfigError("this file exists already", where=str(path), hint="rename it, or choose another --out")
    seen = look(source, template=template)
    seen.check_writes()
    length = PROMPT_TOKENS + drawing.max_tokens
    section = DataSection.model_validate({"eval": data, "template": seen.chosen, "max_length": length})
    dataset, _ = read_data(section.eval, section, seen.codec, "--data", answered=drawing.max_tokens)
    places = list(dataset.places())[:rows]
    prompts = [one for place in places if isinstance(one := dataset.prompt(*place), Prompt)]
    if not prompts:
        raise DataError("there is no prompt to answer", where="--data")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _Part(part, canonical_json(_facts(seen, dataset, prompts, drawing))) as kept:
        if len(kept.answers) < len(prompts):
            _answer(kept, prompts, _Writer(open_model(seen), drawing, dataset))
        answers = kept.answers
    chosen = [
        _row(prompt.dialogue, answer, drawing)
        for prompt, several in zip(prompts, answers, strict=True)
        for answer in kept_of(several, drawing.above)
    ]
    write_atomic(path, "".join(canonical_json(row) + "\n" for row in chosen))
    part.unlink()
    return {
        "out": out,
        "prompts": len(prompts),
        "kept": len(chosen),
        "samples": drawing.samples,
        "best_of": _curve(answers, drawing),
    }


def _facts(seen: Seen, dataset: Dataset, prompts: Sequence[Prompt], drawing: Drawing) -> dict[str, Any]:
    """All that decides what is drawn."""
    files = [file for reward in open_rewards(drawing.rewards, "--reward") for file in reward.files]
    files += [str(file) for file in sorted(seen.named.adapter.glob("*.safetensors"))] if seen.named.adapter else []
    hashes = {**dataset.hashes, **{file: sha256_file(file) for file in files}}
    return {"model": fingerprint(seen.folder), "files": hashes, "prompts": len(prompts), **asdict(drawing)}


def _answer(kept: _Part, prompts: Sequence[Prompt], write: _Writer) -> None:
    """Has the prompts answered that are still to be, a chunk at a time."""
    with progress_bar("writing", len(prompts), bytes_=False) as report:
        for start in range(len(kept.answers), len(prompts), CHUNK):
            kept.add(write(prompts[start : start + CHUNK], start // CHUNK))
            report(len(kept.answers), len(prompts))


def kept_of(several: Sequence[Drawn], above: float | None) -> list[Drawn]:
    """The answers to a prompt that are kept; an empty one teaches nothing."""
    told = [one for one in several if one.text]
    if above is not None:
        return [one for one in told if one.reward >= above]
    return [max(told, key=lambda one: one.reward)] if told else []


def _curve(answers: Sequence[Sequence[Drawn]], drawing: Drawing) -> list[dict[str, float]]:
    """The mean reward of the best of 1, 2, 4, ... samples."""
    if not drawing.rewards:
        return []
    counts = sorted({*(2**power for power in range(drawing.samples.bit_length())), drawing.samples})
    found = []
    for count in counts:
        best = [expected_best([one.reward for one in several], count) for several in answers]
        found.append({"n": count, "reward": sum(best) / len(best), "divergence_bound": divergence_bound(count)})
    return found


def _row(dialogue: Dialogue, answer: Drawn, drawing: Drawing) -> dict[str, Any]:
    """An answer to a prompt as a row that `sft` reads; only the answer is learnt."""
    earned = {"reward": answer.reward} if drawing.rewards else {}
    if dialogue.plain:
        return {"prompt": "".join(one.text for one in dialogue.prompt), "completion": answer.text, **earned}
    # an answer that was there before is read, not learnt
    unlearnt = {"assistant": {"weight": 0}}
    turns = [{"role": one.role, "content": one.text, **unlearnt.get(one.role, {})} for one in dialogue.prompt]
    return {"messages": [*turns, {"role": "assistant", "content": answer.text}], **earned}


class _Writer:
    """A model that answers chunks of prompts, and what judges its answers."""

    def __init__(self, opened: Opened, drawing: Drawing, dataset: Dataset) -> None:
        from tunesmith.models.policy import Policy
        from tunesmith.run.reward_models import RewardModels

        self.opened, self.drawing, self.dataset = opened, drawing, dataset
        rewards = open_rewards(drawing.rewards, "--reward")
        self.rewards = [reward for reward in rewards if not isinstance(reward, Trained)]
        self.policy = Policy(opened.loaded, opened.route)
        self.models = RewardModels(opened.loaded, [reward for reward in rewards if isinstance(reward, Trained)])

    def __call__(self, prompts: Sequence[Prompt], number: int) -> list[list[Drawn]]:
        """The answers to each prompt of a chunk."""
        from tunesmith.models.generate import generate

        drawing, count = self.drawing, self.drawing.samples
        asked = [prompt for prompt in prompts for _ in range(count)]
        found = generate(
            self.opened.loaded,
            self.opened.route,
            [prompt.ids for prompt in asked],
            max_new_tokens=drawing.max_tokens,
            stop_ids={stop for one in prompts for stop in self.dataset.template_of(one.dialogue).stop_ids},
            temperature=drawing.temperature,
            seed=seed_for(drawing.seed, "drawing", number),
            batch_size=CHUNK * min(count, 8),
        )
        texts = [self.opened.codec.decode(one.ids).strip() for one in found]
        ends = [one.ids + ([] if one.end is None else [one.end]) for one in found]
        documents = [
            Example(prompt.ids + ids, [False] * len(prompt.ids) + [True] * len(ids))
            for prompt, ids in zip(asked, ends, strict=True)
        ]
        scores = self.models.scores(self.policy, documents)
        drawn = [
            Drawn(text, len(one.ids), score + sum(reward.weight * reward(prompt, text) for reward in self.rewards))
            for prompt, text, one, score in zip(asked, texts, found, scores, strict=True)
        ]
        return [drawn[start : start + count] for start in range(0, len(drawn), count)]


class _Part:
    """Answers so far, a chunk a line behind a first line of facts. Raises ConfigError where these are others."""

    def __init__(self, path: Path, facts: str) -> None:
        self.path, self.facts = path, facts
        self.answers: list[list[Drawn]] = []

    def __enter__(self) -> _Part:
        try:
            whole = self._read()
            self.stream = open(self.path, "ab")
            self.stream.truncate(whole)
            if not whole:
                self._write(self.facts)
        except OSError as error:
            raise os_error(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def add(self, chunk: Sequence[Sequence[Drawn]]) -> None:
        """Keeps the answers to a chunk of prompts. Raises ResourceError."""
        try:
            self._write(canonical_json([[asdict(one) for one in several] for several in chunk]))
        except OSError as error:
            raise os_error(self.path, error) from error
        self.answers += [list(several) for several in chunk]

    def _write(self, line: str) -> None:
        self.stream.write(line.encode() + b"\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def _read(self) -> int:
        """Takes the whole lines that are there, and gives their bytes: a killed process leaves half a line."""
        lines = list(self._lines())
        if lines and lines[0].decode() != self.facts:
            hint = "delete it, or choose another --out"
            raise ConfigError("holds answers of another model, data or settings", where=str(self.path), hint=hint)
        for line in lines[1:]:
            self.answers += [[Drawn(**one) for one in several] for several in json.loads(line)]
        return sum(len(line) + 1 for line in lines)

    def _lines(self) -> Iterator[bytes]:
        content = self.path.read_bytes() if self.path.exists() else b""
        yield from content.split(b"\n")[:-1]
