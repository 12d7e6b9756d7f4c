"""Writes a model as a Hugging Face folder: the base's own names with the weights as they are now."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.kernels.quantized import dense
from tunesmith.models.load import quiet
from tunesmith.models.ports import base_state

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded

# copied as they are: written anew they might lose rules that only tokenizer.json holds
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


def write_model(loaded: Loaded, folder: Path, shard_bytes: int = 2_000_000_000) -> None:
    """Writes weights, config and tokenizer into a folder that exists. Inserts that are not merged are left out."""
    # transformers saves: some families are stored under other names than they have in memory
    with quiet():
        state = {name: dense(tensor) for name, tensor in base_state(loaded.model).items()}
        loaded.model.save_pretrained(folder, state_dict=state, max_shard_size=shard_bytes)
    for name in TOKENIZER_FILES:
        if (loaded.folder / name).is_file():
            shutil.copyfile(loaded.folder / name, folder / name)
