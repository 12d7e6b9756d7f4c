"""What a config.json says about a model's size, under one set of names, without torch.

Every family spells the same seven numbers in its own way; one table translates. Counting a real model is in
`memory`, tracing one in `trace`; the closed forms here serve where only a config is at hand, and check the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ConfigError, ModelError, did_you_mean
from tunesmith.core.files import read_json

KEYS = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "d_model": ("hidden_size", "n_embd", "d_model", "dim"),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "n_kv_heads": ("num_key_value_heads",),
    "d_head": ("head_dim", "d_kv"),
    "vocab": ("vocab_size",),
}

# families whose feed-forward has a gate beside `up`, and families that tie the head to the embedding unless told
_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2")
_TIED = (
    "gpt2",
    "bert",
    "roberta",
    "distilbert",
    "opt",
    "t5",
    "mpnet",
    "deberta-v2",
    "gemma",
    "gemma2",
    "gemma3_text",
)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide memory and work.

    Attributes:
        family: `model_type` of the config, as in llama or gpt2.
        n_layers: transformer blocks (of the decoder, in an encoder-decoder).
        d_model: width of the residual stream.
        d_mlp: inner width of the feed-forward.
        n_heads: query heads.
        n_kv_heads: key and value heads; fewer than `n_heads` in grouped-query attention.
        d_head: width of one head.
        vocab: rows of the embedding.
        tied: the head is the embedding, counted once.
        gated: the feed-forward has three matrices, not two.
    """

    family: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab: int
    tied: bool = False
    gated: bool = False

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Role to (inputs, outputs) of each matrix of one block."""
        queries, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        found = {
            "q": (self.d_model, queries),
            "k": (self.d_model, keys),
            "v": (self.d_model, keys),
            "o": (queries, self.d_model),
            "up": (self.d_model, self.d_mlp),
            "down": (self.d_mlp, self.d_model),
        }
        if self.gated:
            found["gate"] = (self.d_model, self.d_mlp)
        return found

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the matrices of all blocks: what every token is multiplied by."""
        return self.n_layers * sum(inputs * outputs for inputs, outputs in self.matrices().values())

    @property
    def head_parameters(self) -> int:
        """Numbers in the matrix that gives the logits, tied or not."""
        return self.d_model * self.vocab


def read_shape(source: Mapping[str, Any] | Path | str) -> ModelShape:
    """The shape from a config, a config.json or a folder that holds one. Raises ModelError naming what is missing."""
    config, where = _config(source)
    config = {**config, **config.get("text_config", {})} if isinstance(config.get("text_config"), dict) else config
    family = str(config.get("model_type", ""))
    found = {name: _number(config, keys) for name, keys in KEYS.items()}
    missing = [KEYS[name][0] for name in ("n_layers", "d_model", "n_heads", "vocab") if not found[name]]
    if missing:
        raise ModelError(f"the config says nothing of {', '.join(missing)}", where=where)
    d_model, n_heads = found["d_model"] or 0, found["n_heads"] or 0
    return ModelShape(
        family=family,
        n_layers=found["n_layers"] or 0,
        d_model=d_model,
        d_mlp=found["d_mlp"] or 4 * d_model,
        n_heads=n_heads,
        n_kv_heads=found["n_kv_heads"] or n_heads,
        d_head=found["d_head"] or d_model // n_heads,
        vocab=found["vocab"] or 0,
        tied=bool(config.get("tie_word_embeddings", family in _TIED)),
        gated=family in _GATED or "gated" in str(config.get("feed_forward_proj", "")),
    )


def lora_parameters(shape: ModelShape, rank: int, targets: Iterable[str]) -> int:
    """Trainable numbers of LoRA on these roles in every block: rank x (inputs + outputs) a matrix.

    Source: Hu et al. 2022, arXiv 2106.09685, section 4.2. Raises ConfigError for a role that the shape lacks.
    """
    matrices = shape.matrices()
    targets = list(targets)
    for role in targets:
        if role not in matrices:
            raise ConfigError(
                f"{role!r} is no matrix of {shape.family or 'the model'}; there are {' '.join(matrices)}",
                where="method.targets",
                hint=did_you_mean(role, matrices),
            )
    return shape.n_layers * rank * sum(sum(matrices[role]) for role in targets)


def _config(source: Mapping[str, Any] | Path | str) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    found = read_json(path, ModelError)
    if not isinstance(found, dict):
        raise ModelError("a config is a JSON object", where=str(path))
    return found, str(path)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)
