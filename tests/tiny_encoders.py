"""A tiny encoder as a folder: a word-piece tokenizer with the frame of BERT, random weights, and labelled rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils.logging import disable_progress_bar

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "dull")
NOUNS = ("film", "book", "song", "play", "show")
OTHERS = ("the", "is", "a", "quite", "not", "very", "this", "that", "was", "and")


def wordpiece_folder(path: Path) -> Path:
    """Writes a lower-casing word-piece tokenizer with `[CLS] a [SEP] b [SEP]` as a Hugging Face folder holds it."""
    path.mkdir(parents=True, exist_ok=True)
    # a vocabulary of our own: a trained one differs from run to run where pieces are equally common
    words = [*GOOD, *BAD, *NOUNS, *OTHERS, *".,!?'"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 96, "mask_token": "[MASK]", **named}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def encoder_folder(path: Path, family: str = "bert", **changes: Any) -> Path:
    """Saves a random tiny encoder with that tokenizer, and gives the folder."""
    wordpiece_folder(path)
    disable_progress_bar()
    tiny_model(family, **({"vocab_size": 200} | changes)).save_pretrained(path)
    return path


def opinions(count: int = 40) -> list[dict[str, Any]]:
    """Labelled rows that a mean over word vectors can tell apart."""
    rows = []
    for number in range(count):
        word = (GOOD, BAD)[number % 2][number // 2 % 4]
        rows.append({"text": f"the {NOUNS[number % 5]} is {word}", "label": ("good", "bad")[number % 2]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
