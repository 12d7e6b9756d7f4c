"""Who teaches: a model or a run, found before any weights are loaded, with the vocabulary of the student.

The one idea: a teacher on the student's own base is a route over it, and costs its adapter; any other is a second
model. What a teacher says is `teaching.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import sha256_file
from tunesmith.models.folder import fingerprint
from tunesmith.objectives.distill import Distill
from tunesmith.run.opening import Named, Seen, look
from tunesmith.run.starting import root_of

if TYPE_CHECKING:
    from tunesmith.config import Config
    from tunesmith.data.codec import Codec

WHERE = "objective.teacher"


@dataclass(frozen=True)
class Teacher:
    """A teacher before its weights are loaded.

    Attributes:
        named: what its name stands for.
        folder: of its base.
        beside: it stands on the student's base, as a route.
    """

    named: Named
    folder: Path
    beside: bool

    def hashes(self) -> dict[str, str]:
        """What tells it apart, by file."""
        found = {str(self.folder): fingerprint(self.folder)}
        if self.named.adapter is not None:
            path = self.named.adapter / "adapter_model.safetensors"
            found[str(path)] = sha256_file(path)
        return found


def find_teacher(config: Config, folder: Path, codec: Codec, ahead: Mapping[str, Config]) -> Teacher | None:
    """The teacher of a run; None where its objective has none.

    Args:
        folder, codec: the student's base, and its tokenizer.
        ahead: runs that are still to come, by their folders.

    Raises ConfigError for one that does not write, or has other tokens.
    """
    objective = config.objective
    if not isinstance(objective, Distill):
        return None
    seen = _looked_at(root_of(objective.teacher, ahead))
    promised = ahead.get(objective.teacher)
    if seen.problem is not None or (promised is not None and promised.objective.predicts):
        raise ConfigError(f"{objective.teacher} predicts labels or scores; it writes no text", where=WHERE)
    if seen.family.kind != "decoder" or not seen.family.head:
        raise ConfigError(f"{objective.teacher}: {seen.family.name} gives no logits of a next token", where=WHERE)
    _check_vocabulary(objective.teacher, seen.codec.vocabulary, codec.vocabulary)
    whole = promised is not None and promised.method.trains_all
    beside = seen.folder == folder and not config.method.trains_all and not whole
    return Teacher(seen.named if promised is None else replace(seen.named, adapter=None), seen.folder, beside)


def _looked_at(name: str) -> Seen:
    try:
        return look(name)
    except ModelError as error:
        if error.where != "model":
            raise
        raise ModelError(error.message, where=WHERE, hint=error.hint) from error


def _check_vocabulary(name: str, there: Mapping[str, int], here: Mapping[str, int]) -> None:
    if there == here:
        return
    hint = (
        f"take a teacher of the student's family, or learn from what it writes: tunesmith generate {name} "
        "--data ROWS --out answers.jsonl"
    )
    other = next((token for token in sorted(here) if there.get(token) != here[token]), None)
    if other is None:
        told = f"{len(there)} tokens there and {len(here)} here"
    else:
        told = f"{other!r} is {there.get(other, 'not there')} there and {here[other]} here"
    raise ConfigError(f"the teacher {name} has another vocabulary: {told}", where=WHERE, hint=hint)
