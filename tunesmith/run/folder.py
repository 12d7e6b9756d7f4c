"""The run folder: who may write in it, what is there already, and the files that describe a run.

A folder belongs to one configuration: a second `tune` into it needs `--resume`, and a changed configuration is
refused key by key. Checkpoints are `train.checkpoint`'s, the report is `evaluate.report`'s.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith.config import Config, as_dict, differences
from tunesmith.core.errors import CheckpointError, ConfigError, ResourceError
from tunesmith.core.files import FolderLock, canonical_json, os_error, read_json, write_atomic
from tunesmith.core.yaml import read_yaml, write_yaml_text

PACKAGES = ("tunesmith", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


class RunFolder:
    """The files of one run. Reading never creates anything."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "config.yaml").exists()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that the run was begun with. Raises CheckpointError."""
        path = self.path / "config.yaml"
        try:
            found = read_yaml(path)
        except ConfigError as error:
            raise CheckpointError(f"damaged: {error.message}", where=error.where) from error
        if not isinstance(found, dict) or not {"model", "data", "out"} <= set(found):
            raise CheckpointError("damaged: not the configuration of a run", where=str(path))
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """run.json, or an empty mapping before it is written."""
        path = self.path / "run.json"
        found = read_json(path, CheckpointError) if path.exists() else {}
        if not isinstance(found, dict):
            raise CheckpointError("damaged: not the facts of a run", where=str(path))
        return found

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end and wrote everything."""
        return self.facts.get("status") == "finished"

    def record(self, **facts: Any) -> None:
        """Adds facts to run.json."""
        write_atomic(self.path / "run.json", canonical_json({**self.facts, **facts}, indent=1) + "\n")

    def write_config(self, config: Config) -> None:
        """Writes config.yaml with every default written out."""
        write_atomic(self.path / "config.yaml", write_yaml_text(as_dict(config)))

    def withdraw(self) -> None:
        """Takes back a run that was begun and has done nothing yet."""
        for name in ("config.yaml", "run.json", "plan.json"):
            (self.path / name).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises ResourceError where a run folder could not be made, before anything expensive is done."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ResourceError("a file is in the way; out: names a folder", where=str(parent))
    if not os.access(parent, os.W_OK):
        reason = "the file system is read-only" if os.access(parent, os.R_OK) else "permission denied"
        raise ResourceError(f"cannot write here: {reason}", where=str(parent), hint="choose another out:")


def check_state(folder: RunFolder, config: Config, resume: bool) -> None:
    """Raises where this configuration may not run in this folder: ConfigError, or CheckpointError on resume."""
    if not folder.exists:
        if resume:
            raise CheckpointError(
                "nothing to resume: no run was begun here", where=str(folder.path), hint="leave out --resume"
            )
        return
    if not resume:
        raise ConfigError(
            "this folder holds a run already",
            where=f"out: {folder.path}",
            hint="--resume goes on with it; another out: begins a new one",
        )
    # how a run is spread, and what waits outside memory, may change: checkpoints do not depend on it
    found = differences(folder.config, as_dict(config))
    changed = [told for told in found if not told.startswith(("layout.", "train.offload:"))]
    if changed:
        raise CheckpointError(
            "the configuration is not the one the run was begun with: " + "; ".join(changed),
            where=str(folder.path),
            hint="undo the change, or begin a new run with another out:",
        )


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Makes the folder and holds it for this process. Raises BusyError or ResourceError."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = os_error(folder.path, error)
        hint = problem.hint or "choose another out:"
        raise ResourceError(problem.message, where=problem.where, hint=hint) from error
    with FolderLock(folder.path):
        yield


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The machine as a reader of the report wants to know it."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
