"""Turns a run into artefacts that other programs load."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunesmith.core.errors import ConfigError
from tunesmith.core.files import atomic_folder
from tunesmith.run.opening import look, open_model


def ship(source: str, to: str, target: str) -> Path:
    """Writes a run as `peft`, `merged` or `gguf` and answers the path.

    Raises: ConfigError where the target exists or the run has no adapter to write; ModelError.
    """
    from tunesmith.export.merged import refuse_existing

    path = Path(target)
    refuse_existing(path)
    if to == "peft":
        return _adapter(source, path)
    seen = look(source)
    if to == "gguf" and seen.problem is not None:
        told = f"it predicts {seen.problem.line()}; GGUF holds models that write text"
        raise ConfigError(told, where=source, hint="use --to merged")
    from tunesmith.adapt.merge import merge
    from tunesmith.models.ports import attached_to

    # fp32, so that the delta is added before anything is rounded
    opened = open_model(seen, precision="fp32")
    if opened.adapter is not None and (opened.adapter.inserts() or opened.adapter.trained):
        merge(opened.loaded, opened.route.adapters)
    if to == "merged":
        from tunesmith.export.merged import save_merged

        # what was opened has at most one head: that of the run
        return save_merged(opened.loaded, path, head=next(iter(attached_to(opened.loaded.model).heads.values()), None))
    from tunesmith.export.gguf import save_gguf

    return save_gguf(opened.loaded, path)


def _adapter(source: str, path: Path) -> Path:
    adapter = look(source).named.adapter
    if adapter is None:
        raise ConfigError("there is no adapter here: the whole model was trained", where=source, hint="use --to merged")
    with atomic_folder(path) as work:
        for file in adapter.iterdir():
            shutil.copyfile(file, work / file.name)
    return path
