"""Checkpoints written and read by one process, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tunesmith.train.checkpoint import MOMENTS, WEIGHTS, Checkpoints, State, read_parts, write_parts
from tunesmith.train.tensor_file import kind_of, whole


def save(checkpoints: Checkpoints, state: State, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """A checkpoint after 1.5 seconds."""
    files = {WEIGHTS: weights, MOMENTS: moments}
    kinds = {file: {name: kind_of(tensor) for name, tensor in held.items()} for file, held in files.items()}
    work = checkpoints.draft(state, kinds)
    for file, held in files.items():
        write_parts(work / file, {name: whole(tensor) for name, tensor in held.items()})
    checkpoints.publish(work, state.step, 1.5)


def read(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fills tensors from a file."""
    read_parts(
        path,
        {name: kind_of(tensor) for name, tensor in into.items()},
        {name: whole(tensor) for name, tensor in into.items()},
    )
