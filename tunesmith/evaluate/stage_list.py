"""The file that says which stages a folder holds, in their order."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import CheckpointError
from tunesmith.core.yaml import read_yaml

LIST = "stages.yaml"


def holds_stages(folder: Path) -> bool:
    """Whether a folder is that of a list of stages."""
    return (folder / LIST).exists()


def names_in(folder: Path) -> list[str]:
    """The stages of a folder, in their order. Raises CheckpointError for a damaged list."""
    found = read_yaml(folder / LIST)
    names = found.get("stages") if isinstance(found, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError("damaged: not a list of stages", where=str(folder / LIST))
    return names
