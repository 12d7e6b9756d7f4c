"""Writes a model as a plain Hugging Face folder, which transformers alone can load with equal logits.

The one idea: adapters never change base names, so what is saved is the base's own names with the weights as they are
now; merge adapters first (`adapt/merge.py`). GGUF is written in `gguf.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ConfigError
from tunesmith.core.files import atomic_folder

if TYPE_CHECKING:
    from tunesmith.models.heads import Head
    from tunesmith.models.load import Loaded


def save_merged(
    loaded: Loaded, folder: Path | str, *, head: Head | None = None, shard_bytes: int = 2_000_000_000
) -> Path:
    """Saves weights, config and tokenizer, and a prediction head beside them; the folder appears whole or not at all.

    Tensors keep their dtype. Adapters that are attached but not merged are left out.

    Raises:
        ConfigError: the folder exists and is not empty.
        ResourceError: no room, or not writable.
    """
    from tunesmith.models.heads import keep_head
    from tunesmith.models.load import quiet
    from tunesmith.models.save import write_model

    folder = Path(folder).expanduser().absolute()
    refuse_existing(folder)
    _tell_untied(loaded)
    with atomic_folder(folder) as work, quiet():
        write_model(loaded, work, shard_bytes)
        if head is not None:
            keep_head(head, work)
    return folder


def refuse_existing(path: Path) -> None:
    """Raises ConfigError when something is there already: exports never replace."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError("exists already", where=str(path), hint="choose another place, or remove it")


def _tell_untied(loaded: Loaded) -> None:
    """A head that has become a matrix of its own would be overwritten by the embedding when loaded as tied."""
    head: Any = loaded.model.get_output_embeddings()
    embedding: Any = loaded.model.get_input_embeddings()
    if not getattr(loaded.config, "tie_word_embeddings", False) or head is None or embedding is None:
        return
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        loaded.config.tie_word_embeddings = False
