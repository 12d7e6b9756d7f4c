"""A completion ready to learn from, and rollouts on disk while updates use them.

The one idea: what was written by weights that have moved since cannot be written again, so it is a file before the
first update; old ones go once no checkpoint can ask for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.errors import CheckpointError
from tunesmith.core.files import canonical_json, read_json, strict_loads, write_atomic
from tunesmith.data.encode import Example

if TYPE_CHECKING:
    from tunesmith.train.section import TrainSection


@dataclass(frozen=True)
class Rollout:
    """One completion, ready to learn from; its tensors are float32 [actions].

    Attributes:
        number: its place among those of the rollout.
        example: prompt and completion as tokens, the completion supervised.
        question, text: the same for people.
        reward: what it earned.
        stopped: it ended by itself.
    """

    number: int
    example: Example
    question: str
    text: str
    reward: float
    stopped: bool
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        return self.example.ids

    @property
    def actions(self) -> int:
        """Tokens of the completion."""
        return sum(self.example.supervised)

    @property
    def nats_apart(self) -> float:
        """How much likelier it was than under the reference, where both are known."""
        assert self.old is not None
        assert self.reference is not None
        return float((self.old - self.reference).double().sum())


_TENSORS = ("old", "reference", "values", "advantages", "returns")


class Kept:
    """The rollouts of a run in a folder, by the number of the first update that uses them.

    Args:
        updates: that use a rollout.
    """

    def __init__(self, folder: Path, train: TrainSection, updates: int) -> None:
        self.folder = folder
        # a damaged checkpoint sends a run back to the one before it
        self.reach_steps = train.save_every * (train.keep + 1) + updates

    def write(self, number: int, updates: Sequence[Sequence[Rollout]]) -> None:
        """Keeps a rollout, its completions by update, whole or not at all. Raises ResourceError."""
        body = canonical_json([[plain(one) for one in rows] for rows in updates])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(number), canonical_json({"sha256": _sha256(body), "rollout": body}))
        for path in self.folder.glob("step-*.json"):
            if int(path.stem.removeprefix("step-")) < number - self.reach_steps:
                path.unlink()

    def read(self, number: int) -> list[list[Rollout]]:
        """A rollout as it was written. Raises CheckpointError where it is not there or damaged."""
        path = self._path(number)
        if not path.exists():
            raise CheckpointError("the completions that this step learns from are gone", where=str(path))
        found = read_json(path, CheckpointError)
        body = found.get("rollout") if isinstance(found, dict) else None
        if not isinstance(body, str) or _sha256(body) != found.get("sha256"):
            raise CheckpointError("damaged: its bytes are not those that were written", where=str(path))
        return [[from_plain(one) for one in rows] for rows in strict_loads(body)]

    def _path(self, number: int) -> Path:
        return self.folder / f"step-{number:06d}.json"


def _sha256(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


def plain(one: Rollout) -> dict[str, Any]:
    """A completion as JSON has it."""
    found: dict[str, Any] = {entry.name: getattr(one, entry.name) for entry in fields(one)}
    # a float32 is written with the digits of the double that it is, and comes back the same
    tensors = {name: None if found[name] is None else found[name].tolist() for name in _TENSORS}
    return {**found, **tensors, "example": asdict(one.example)}


def from_plain(found: dict[str, Any]) -> Rollout:
    """The completion that `plain` was given."""
    tensors = {
        name: None if found[name] is None else torch.tensor(found[name], dtype=torch.float32) for name in _TENSORS
    }
    example = {**found["example"], "labels": (), "types": ()}
    return Rollout(**{**found, **tensors, "example": Example(**example)})
