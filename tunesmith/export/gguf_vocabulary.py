"""A Hugging Face tokenizer as the `tokenizer.*` entries of a GGUF file: the way back of `models/gguf_tokenizer.py`.

The one idea: what cannot be said in GGUF is refused by name, since a tokenizer that is nearly right gives other ids.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError
from tunesmith.core.files import read_json
from tunesmith.models.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, USER_DEFINED


def describe_vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """The entries, by GGUF key, of the tokenizer in a model folder.

    Args:
        rows: of the embedding; there must be one token for each, so unused ones get a name.

    Raises:
        ModelError: the tokenizer is of a kind, or cuts text by a rule, that GGUF has no name for.
    """
    described = read_json(folder / "tokenizer.json", ModelError)
    where = str(folder / "tokenizer.json")
    if described["model"].get("type") != "BPE":
        raise ModelError(f"GGUF export knows BPE tokenizers, not {described['model'].get('type')}", where=where)
    tokens, kinds = _tokens(described, rows, where)
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    if described["model"].get("byte_fallback"):
        found["tokenizer.ggml.model"] = "llama"
        found["tokenizer.ggml.scores"] = _scores(tokens, kinds, merges)
        found["tokenizer.ggml.add_space_prefix"] = _adds_space(described)
    else:
        found["tokenizer.ggml.model"] = "gpt2"
        found["tokenizer.ggml.pre"] = split_name(described.get("pre_tokenizer"), where)
        found["tokenizer.ggml.merges"] = merges
    return found | _roles(folder, tokens)


def split_name(pre_tokenizer: Any, where: str) -> str:
    """What GGUF calls a rule for cutting text. Raises ModelError when it has no name that is known here."""
    wanted = _essence(pre_tokenizer)
    for name, rule in SPLITS.items():
        if _essence(rule) == wanted:
            return name
    raise ModelError(
        "the rule by which its tokenizer cuts text has no name in GGUF that is known here",
        where=where,
        hint=f"export to merged instead; known are {' '.join(SPLITS)}",
    )


def _essence(rule: Any) -> Any:
    """A pre-tokenizer without what does not change ids: positions, and sequences of one."""
    if not isinstance(rule, dict):
        return rule
    if rule.get("type") == "Sequence" and len(rule["pretokenizers"]) == 1:
        return _essence(rule["pretokenizers"][0])
    return {
        key: [_essence(part) for part in value] if isinstance(value, list) else value
        for key, value in rule.items()
        if key != "trim_offsets"
    }


def _tokens(described: dict[str, Any], rows: int, where: str) -> tuple[list[str], list[int]]:
    tokens = [f"[UNUSED{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    unknown = described["model"].get("unk_token")
    vocabulary = described["model"]["vocab"]
    added = {token["id"]: token for token in described.get("added_tokens") or []}
    largest = max([*vocabulary.values(), *added])
    if largest >= rows:
        raise ModelError(f"has token id {largest}, but the embedding has {rows} rows", where=where)
    for token, index in vocabulary.items():
        byte = described["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[index], kinds[index] = token, BYTE if byte else UNKNOWN if token == unknown else NORMAL
    for index, token in added.items():
        tokens[index] = token["content"]
        if kinds[index] != UNKNOWN:
            kinds[index] = CONTROL if token.get("special") else USER_DEFINED
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """SentencePiece ranks tokens where BPE ranks merges: a token's score is that of the first merge that makes it."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, _, right = pair.partition(" ")
        first.setdefault(left + right, rank)
    return [
        -float(first.get(token, len(merges))) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    text = str(described.get("normalizer")) + str(described.get("pre_tokenizer"))
    return "'Prepend'" in text or "'prepend_scheme': 'first'" in text or "'prepend_scheme': 'always'" in text


def _roles(folder: Path, tokens: list[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    settings = (
        read_json(folder / "tokenizer_config.json", ModelError) if (folder / "tokenizer_config.json").exists() else {}
    )
    if (folder / "special_tokens_map.json").exists():
        settings = read_json(folder / "special_tokens_map.json", ModelError) | settings
    ids = {token: index for index, token in enumerate(tokens)}
    found: dict[str, Any] = {}
    for role, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[f"tokenizer.ggml.{role}_token_id"] = ids[token]
    around = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids  # what encoding really adds
    found["tokenizer.ggml.add_bos_token"] = around[0] == found.get("tokenizer.ggml.bos_token_id")
    found["tokenizer.ggml.add_eos_token"] = around[-1] == found.get("tokenizer.ggml.eos_token_id")
    template = _template(folder, settings)
    return found | ({"tokenizer.chat_template": template} if template else {})


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
