"""Tiny models as folders on disk, with a tokenizer, the way users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer_folder
from tiny_models import tiny_model
from transformers.utils.logging import disable_progress_bar

ROWS = 400  # of the embedding; the tiny tokenizer has at most 384 tokens


def tiny_folder(path: Path, family: str = "llama", *, tokenizer: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Saves a random tiny model of a family with a byte-level tokenizer, and gives the folder."""
    tiny_tokenizer_folder(path, **(tokenizer or {}))
    disable_progress_bar()
    tiny_model(family, **({"vocab_size": ROWS} | changes)).save_pretrained(path)
    return path
