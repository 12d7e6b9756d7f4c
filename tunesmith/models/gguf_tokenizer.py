"""The tokenizer inside a GGUF file, as the files that Hugging Face readers expect.

The one idea: GGUF stores vocabulary and merges but only the *name* of the rule that cuts text before
merging, and a wrong rule silently gives other ids (digits stay together, say). `SPLITS` says what each name
means, for reading here and for writing in `export/gguf.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes_only(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _cut(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _bytes_only(use_regex=False)]}


_DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes_only(use_regex=True)],
}
# name in tokenizer.ggml.pre -> the pre_tokenizer of a tokenizer.json
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": _bytes_only(use_regex=True),
    "smollm": _DIGITS_APART,
    "llama-bpe": _cut(_WORDS.replace("NUMBER", r"\p{N}{1,3}")),
    "qwen2": _cut(_WORDS.replace("NUMBER", r"\p{N}")),
    "tekken": _cut(_TEKKEN),
}
_SAME_SPLIT = {
    "gpt-2": "default phi-2 mpt olmo jais gigachat roberta-bpe exaone4",
    "smollm": "starcoder refact command-r codeshell minerva-7b trillion",
    "llama-bpe": "llama3 llama-v3 dbrx smaug-bpe falcon3 pixtral chatglm-bpe glm4",
    "qwen2": "deepseek-r1-qwen stablelm2 qwen3 hunyuan",
    "tekken": "",
}
_ALIASES = {alias: name for name, aliases in _SAME_SPLIT.items() for alias in aliases.split()}


def write_tokenizer(metadata: dict[str, Any], folder: Path, where: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json from the `tokenizer.*` entries of a GGUF file.

    Raises:
        ModelError: the file has no tokenizer, or one of a kind that is not known here.
    """
    from tokenizers import Tokenizer

    described = describe_tokenizer(metadata, where)
    try:
        Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # tokenizers raises plain Exception, whatever is wrong
        raise ModelError(f"its tokenizer cannot be rebuilt: {error}", where=where) from error
    for name, value in (("tokenizer.json", described), ("tokenizer_config.json", _config(metadata))):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")


def describe_tokenizer(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError("it holds no tokenizer", where=where, hint="use a GGUF of a whole model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"its tokenizer is of the unknown kind {kind!r}; known are gpt2, llama", where=where)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError("two tokens of its vocabulary have the same text", where=where)
    parts = _byte_level(metadata, where) if kind == "gpt2" else _sentencepiece(metadata, vocabulary)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, **parts.pop("model"),
    }  # fmt: skip
    fixed = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(metadata)}
    return {**fixed, **parts, "post_processor": _post_processor(metadata, tokens), "model": model}


def _byte_level(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    name = _ALIASES.get(name, name)
    if name not in SPLITS:
        print(
            f"warning: {where}: the rule {name!r} for cutting text is not known; GPT-2's is used, so some text "
            "may become other tokens than the model was trained with",
            file=sys.stderr,
        )
        name = "gpt-2"
    merges = [pair.split(" ", 1) for pair in metadata.get("tokenizer.ggml.merges", [])]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": SPLITS[name],
        "decoder": decoder,
        "model": {"merges": merges, "ignore_merges": name in ("llama-bpe", "tekken")},
    }


def _sentencepiece(metadata: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    back = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = {
        "merges": _merges_from_scores(metadata, vocabulary),
        "unk_token": metadata["tokenizer.ggml.tokens"][unknown],
        "fuse_unk": True,
        "byte_fallback": True,
    }
    normalizer = {"type": "Sequence", "normalizers": steps}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model,
    }


def _merges_from_scores(metadata: dict[str, Any], vocabulary: dict[str, int]) -> list[list[str]]:
    """SentencePiece joins the neighbours that make the best-scored token: these pairs, in this order."""
    if metadata.get("tokenizer.ggml.merges"):
        return [pair.split(" ", 1) for pair in metadata["tokenizer.ggml.merges"]]
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(vocabulary)
    kinds = _kinds(metadata)
    pairs: list[tuple[float, int, int, int, str, str]] = []
    for token, index in vocabulary.items():
        if kinds[index] != NORMAL:
            continue
        for at in range(1, len(token)):
            left, right = vocabulary.get(token[:at]), vocabulary.get(token[at:])
            if left is not None and right is not None:
                pairs.append((-scores[index], index, left, right, token[:at], token[at:]))
    return [[left, right] for *_, left, right in sorted(pairs)]


def _kinds(metadata: dict[str, Any]) -> list[int]:
    return metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(metadata["tokenizer.ggml.tokens"])


def _added(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding", "unknown")}
    return [
        {"id": index, "content": tokens[index], **plain, "special": kind == CONTROL or index in named}
        for index, kind in enumerate(_kinds(metadata))
        if kind in (CONTROL, USER_DEFINED) or index in named
    ]


def _adds(metadata: dict[str, Any], role: str) -> bool:
    """Whether encoding puts the begin or end token around a text; GGUF leaves the usual case unsaid."""
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    rule = metadata.get("tokenizer.ggml.pre", "")
    usual = role == "bos" and (sentencepiece or _ALIASES.get(rule, rule) == "llama-bpe")
    wanted = metadata.get(f"tokenizer.ggml.add_{role}_token", usual)
    return bool(wanted) and metadata.get(f"tokenizer.ggml.{role}_token_id") is not None


def _post_processor(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    ids = {role: metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos") if _adds(metadata, role)}
    if not ids:
        return None
    special = {role: {"SpecialToken": {"id": tokens[index], "type_id": 0}} for role, index in ids.items()}

    def around(name: str, number: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": number}}
        return [part for part in (special.get("bos"), text, special.get("eos")) if part]

    known = {tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]} for index in ids.values()}
    single, second = around("A", 0), around("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": known}


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{role}_token_id") for key, role in roles.items()}
    architecture = metadata.get("general.architecture", "")
    found: dict[str, Any] = {key: tokens[index] for key, index in ids.items() if index is not None}
    found |= {f"add_{role}_token": _adds(metadata, role) for role in ("bos", "eos")}
    if metadata.get("tokenizer.chat_template"):
        found["chat_template"] = metadata["tokenizer.chat_template"]
    if metadata.get(f"{architecture}.context_length"):
        found["model_max_length"] = metadata[f"{architecture}.context_length"]
    # the generic class: the class of the model's family would rebuild its own rules and lose ours
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **found}
