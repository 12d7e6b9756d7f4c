"""A tiny T5 as a folder: a unigram tokenizer whose words begin with a mark, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import SENTENCES
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.utils.logging import disable_progress_bar

ROWS = 160


def t5_folder(path: Path, **changes: Any) -> Path:
    """Saves tokenizer and model, and gives the folder."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=ROWS, special_tokens=special, unk_token="<unk>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz:?.,0123456789"),
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **named}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    disable_progress_bar()
    tiny_model("t5", **({"vocab_size": ROWS, "eos_token_id": 1, "pad_token_id": 0} | changes)).save_pretrained(path)
    return path
