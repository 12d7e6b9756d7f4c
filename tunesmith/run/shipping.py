"""Turns a run into artefacts that other programs load."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.errors import ConfigError
from tunesmith.core.files import atomic_folder
from tunesmith.run.opening import look, open_model

if TYPE_CHECKING:
    from tunesmith.kernels.quantized import Kind


def ship(source: str, to: str, target: str, requantise: Kind | None = None) -> Path:
    """Writes a run as `peft`, `merged` or `gguf` and answers the path.

    What an adapter learnt on codes is added to the numbers of these codes.

    Args:
        requantise: round the merged maps to what codes of this kind can say, and tell what that changed.

    Raises: ConfigError where the target exists, the run has no adapter to write, or there is nothing to round;
        ModelError.
    """
    if requantise is not None and to != "merged":
        raise ConfigError(f"has no effect with --to {to}", where="--requantize", hint="use --to merged")
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
    before = {name: held.detach() for name, held in opened.loaded.model.named_parameters()}
    if opened.adapter is not None and (opened.adapter.inserts() or opened.adapter.trained):
        merge(opened.loaded, opened.route.adapters)
    if requantise is not None:
        from tunesmith.models.quantize import requantise as round_to_codes

        error, lost = round_to_codes(opened.loaded.model, requantise, before)
        told = f"requantised to {requantise}: rounding is {100 * error:.2f} % of the merged maps' norm"
        print(f"{told}, {100 * lost:.0f} % of what the adapter had changed in them", file=sys.stderr)
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
