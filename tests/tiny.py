"""Small models and tokenizers that tests build for themselves, in milliseconds and without downloads."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "user assistant system tool: name three colours, please.",
    "Red, green and blue are three colours. What is the capital of France? Paris.",
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\n### Input:\n### Response:\n",
    "one line\n\nanother line\n\n\na third line\n\n",
)


def tiny_tokenizer_folder(
    path: Path | str,
    *,
    template: str | None = CHATML,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    structural: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = None,
    vocab_size: int = 384,
    words: str | None = None,
) -> Path:
    """Writes a byte-level BPE tokenizer as a Hugging Face folder holds it.

    `structural` are added tokens that are not marked special; `words` is a regular expression that cuts text
    into words, by default that of GPT-2.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        cut = pre_tokenizers.Split(Regex(words), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in structural])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    known = {key: value for key, value in names.items() if value is not None}
    (folder / "special_tokens_map.json").write_text(json.dumps(known))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, **known}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
