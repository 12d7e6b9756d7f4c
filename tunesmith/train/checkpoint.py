"""Checkpoints that are complete or absent, and the choice of the one to resume from.

A checkpoint is written beside its place, flushed and renamed: drafted and published by one process, filled by all that
have a part of it. Its manifest holds the size and SHA-256 of every file and of itself, so that one flipped byte
anywhere is noticed; then the one before it is used. No pickle.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import CheckpointError, ResourceError
from tunesmith.core.files import (
    canonical_json,
    draft_folder,
    os_error,
    publish_folder,
    read_json,
    sha256_file,
    strict_loads,
    sync_folder,
)
from tunesmith.kernels.build import made_with
from tunesmith.train.tensor_file import Kind, Part, TensorFile, create

log = logging.getLogger(__name__)

WEIGHTS, MOMENTS, STATE, MANIFEST = "weights.safetensors", "moments.safetensors", "state.json", "manifest.json"
MEMORY = "memory."  # before the names of what a method remembers, which lies with the moments
FORMAT = 2
_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d{6,}\..*")
_REPLACED = re.compile(r"\.(step-\d{6,})\.[^.]+\.old")  # what atomic_folder moves out of the way


@dataclass
class State:
    """What a run remembers besides weights and moments. The same steps give the same bytes.

    Attributes:
        step: updates done.
        cursor: where the data continues; empty at the very start.
        epoch: passes over the data so far.
        tokens, supervised_tokens, rows: consumed so far.
        dropped: rows met and left out so far, by reason.
        best_value, best_step: of the metric to stop on.
        bad_evaluations: evaluations in a row without a new best.
        reason: why the run is over; empty while it is not.
        updates: since the optimizer's moments were fresh; none of a step that loss scaling left out.
        scaling: the fields of `scaling.LossScale`; empty where the loss is not scaled.
        pending: the record of the last step as JSON, when the run was stopped before its evaluation was done.
    """

    step: int = 0
    cursor: dict[str, Any] | None = None
    epoch: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    reason: str = ""
    updates: int = 0
    scaling: dict[str, Any] = field(default_factory=dict)
    pending: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been checked.

    Attributes:
        path: its folder.
        state: what the run remembered.
        threads: of the process that wrote it.
        torch_version: likewise.
        kernels: likewise, as `made_with` says it; empty in a checkpoint that does not tell.
        elapsed_seconds: that the run had taken, over all its processes.
    """

    path: Path
    state: State
    threads: int
    torch_version: str
    kernels: str
    elapsed_seconds: float


def read_parts(path: Path, kinds: Mapping[str, Kind], parts: Mapping[str, Part]) -> None:
    """Fills this process's parts from a file of tensors of these kinds. Raises CheckpointError when they differ."""
    try:
        stored = TensorFile(path)
        _same_names(path, set(stored.kinds), set(kinds))
        for name, kind in kinds.items():
            if stored.kinds[name] != kind:
                raise CheckpointError(f"{name} is {stored.kinds[name]}, not {kind}", where=str(path))
        stored.read(parts)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def write_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """Puts this process's parts into a file of a draft. Raises ResourceError."""
    try:
        TensorFile(path).write(parts)
    except FileNotFoundError as error:
        told = "this process does not see what the first one has made"
        raise ResourceError(told, where=str(path), hint="choose an out: that all machines share") from error
    except OSError as error:
        raise os_error(path, error) from error


def _same_names(path: Path, stored: set[str], wanted: set[str]) -> None:
    for label, names in (("lacks", wanted - stored), ("has unknown", stored - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise CheckpointError(f"{label} {len(names)} tensors: {shown}", where=str(path))


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: `checkpoints/` of the run folder.
        keep: newest ones that `prune` leaves, besides the best.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a folder of the right name, newest first; whether it is whole is another question."""
        try:
            names = [_NAME.fullmatch(entry.name) for entry in os.scandir(self.folder) if entry.is_dir()]
        except FileNotFoundError:
            return []
        return sorted((int(match.group(1)) for match in names if match), reverse=True)

    def draft(self, state: State, kinds: Mapping[str, Mapping[str, Kind]]) -> Path:
        """Begins the checkpoint of `state.step`: a folder to fill, with room for the tensors of each file.

        Raises ResourceError.
        """
        work = draft_folder(self.path(state.step))
        try:
            for file, held in kinds.items():
                create(work / file, held)
            (work / STATE).write_text(canonical_json(asdict(state), indent=1), "utf-8")
        except OSError as error:
            self.discard(work)
            raise os_error(self.path(state.step), error) from error
        return work

    def publish(self, work: Path, step: int, elapsed_seconds: float = 0.0) -> None:
        """Makes a draft that is filled a checkpoint; when this returns it is on the disk. Raises ResourceError."""
        try:
            (work / MANIFEST).write_text(_manifest(work, elapsed_seconds), "utf-8")
            publish_folder(work, self.path(step))
        except OSError as error:
            raise os_error(self.path(step), error) from error

    def discard(self, work: Path) -> None:
        """Takes back a draft."""
        shutil.rmtree(work, ignore_errors=True)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step, every byte checked. Raises CheckpointError saying what is wrong with it."""
        path = self.path(step)
        manifest = _read_manifest(path)
        for name in (WEIGHTS, MOMENTS, STATE):
            _check_file(path / name, manifest["files"].get(name))
        state = _read_state(path)
        if state.step != step:
            raise CheckpointError(f"holds step {state.step}, not the step of its name", where=str(path))
        made = manifest["threads"], manifest["torch_version"], manifest.get("kernels", "")
        return Checkpoint(path, state, *made, float(manifest["elapsed_seconds"]))

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, None when there is none at all.

        Damaged ones that are newer are named, warned about and put aside as `step-N.damaged`, so that they can
        neither be taken again nor push a good one out. Raises CheckpointError when all are damaged.
        """
        rejected: list[tuple[int, CheckpointError]] = []
        for step in self.steps():
            try:
                found = self.load(step)
            except CheckpointError as error:
                rejected.append((step, error))
                continue
            for bad, why in rejected:
                lost = f"step {step} is used instead, {bad - step} steps are repeated"
                log.warning("checkpoint of step %d is damaged: %s; %s", bad, why, lost)
                self._put_aside(bad)
            return found
        if rejected:
            reasons = "\n".join(f"  {why}" for _, why in rejected)
            raise CheckpointError(f"no checkpoint can be used:\n{reasons}", where=str(self.folder))
        return None

    def _put_aside(self, step: int) -> None:
        aside = self.path(step).with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            os.rename(self.path(step), aside)
        except OSError as error:
            raise os_error(self.path(step), error) from error

    def prune(self, best_step: int | None = None) -> None:
        """Removes all but the newest `keep` and the best. Call it once the newest is on the disk."""
        for step in self.steps()[self.keep :]:
            if step != best_step:
                self._remove(self.path(step))

    def _remove(self, path: Path) -> None:
        # renamed first: a process that dies half-way through leaves no folder that looks like a checkpoint
        doomed = path.with_name(f".{path.name}.old")
        try:
            os.rename(path, doomed)
            sync_folder(self.folder)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error.strerror)
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Clears up after a process that died while saving or removing. Only for the one owner of the folder."""
        if not self.folder.is_dir():
            return
        for name in sorted(entry.name for entry in os.scandir(self.folder) if _LEFTOVER.fullmatch(entry.name)):
            replaced = _REPLACED.fullmatch(name)
            if replaced and not (self.folder / replaced.group(1)).exists():
                # it died between moving the old one away and the new one in
                os.rename(self.folder / name, self.folder / replaced.group(1))
            else:
                shutil.rmtree(self.folder / name, ignore_errors=True)


def _manifest(folder: Path, elapsed_seconds: float) -> str:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in (WEIGHTS, MOMENTS, STATE)
    }
    content = {
        "format": FORMAT,
        "files": files,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": made_with(),
        "elapsed_seconds": round(elapsed_seconds, 3),
    }
    return _sealed(content)


def _sealed(content: dict[str, Any]) -> str:
    seal = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return canonical_json({**content, "seal": seal}, indent=1)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError("the file is missing", where=str(file))
    try:
        text = file.read_bytes().decode("utf-8")
        manifest = strict_loads(text)
        content = {key: value for key, value in manifest.items() if key != "seal"}
        whole = _sealed(content) == text
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"not what was written: {error}", where=str(file)) from error
    if not whole:
        raise CheckpointError("not what was written: its bytes do not match its own hash", where=str(file))
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"format {manifest.get('format')}; this version reads {FORMAT}", where=str(file))
    return manifest


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{size} bytes instead of {entry['bytes']}", where=str(path))
        if sha256_file(path) != entry["sha256"]:
            raise CheckpointError("its bytes do not match the hash in the manifest", where=str(path))
    except FileNotFoundError as error:
        raise CheckpointError("the file is missing", where=str(path)) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _read_state(path: Path) -> State:
    raw = read_json(path / STATE, CheckpointError)
    if set(raw) != {entry.name for entry in fields(State)}:
        raise CheckpointError("not the state of a run", where=str(path / STATE))
    return State(**raw)
