"""config.json of a model that is stored as GGUF.

The one idea: sizes come from the file's metadata or its tensors, never from a default of some model family;
where a file says less than config.json needs, the rule is written here with its reason.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError
from tunesmith.models.gguf_layout import Layout

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader


def heads_of(metadata: dict[str, Any]) -> tuple[int, int]:
    """Attention heads, and heads of keys and values."""
    prefix = f"{metadata['general.architecture']}.attention."
    heads = int(metadata[prefix + "head_count"])
    return heads, int(metadata.get(prefix + "head_count_kv", heads))


def config_of(reader: GGUFReader, metadata: dict[str, Any], layout: Layout, where: str) -> dict[str, Any]:
    """What config.json says. Raises ModelError for rotary scaling that cannot be expressed there."""
    prefix = metadata["general.architecture"] + "."
    config = {theirs: metadata[prefix + ours] for ours, theirs in layout.keys.items() if prefix + ours in metadata}
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    config |= {
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "dtype": "float32",
        "vocab_size": shapes["token_embd.weight"][1],
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_cache": True,
    }
    for role, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[key] = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if layout.model_type == "gpt2":
        return config
    heads, key_heads = heads_of(metadata)
    width = int(metadata.get(prefix + "rope.dimension_count", config["hidden_size"] // heads))
    config["num_key_value_heads"] = key_heads
    config.setdefault("head_dim", width)
    if layout.model_type in ("llama", "qwen3"):  # the other families decide this by themselves
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if layout.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if layout.model_type == "gemma2":
        # not stored; the 46-block model alone scales by another width (llama.cpp)
        whole = config["hidden_size"] // heads
        config["query_pre_attn_scalar"] = whole if config["num_hidden_layers"] == 46 else config["head_dim"]
    config["rope_parameters"] = _rope(reader, metadata, config, where)
    return config


def _rope(reader: GGUFReader, metadata: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    prefix = f"{metadata['general.architecture']}.rope."
    base = float(config.pop("rope_theta", 10000.0))
    kind = metadata.get(prefix + "scaling.type", "none")
    factor = float(metadata.get(prefix + "scaling.factor", 1.0))
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        return {"rope_theta": base, **_llama3_scaling(factors, base, config["head_dim"], where)}
    if kind == "none" or factor == 1.0:
        return {"rope_theta": base, "rope_type": "default"}
    found = {"rope_theta": base, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = metadata.get(prefix + "scaling.original_context_length", config["max_position_embeddings"])
        return {**found, "original_max_position_embeddings": original}
    if kind == "linear":
        return found
    raise ModelError(f"rotary scaling of the kind {kind!r} cannot be converted", where=where)


def llama3_divisors(rope: dict[str, Any], base: float, width: int) -> np.ndarray:
    """By how much Llama 3 divides each of the `width / 2` rotary frequencies (Llama 3.1 model card, 2024).

    Waves longer than `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those shorter
    than `.../ high_freq_factor` not at all, those between smoothly.
    """
    import numpy as np

    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _llama3_scaling(divisors: np.ndarray, base: float, width: int, where: str) -> dict[str, Any]:
    """Llama 3 files hold the divisors of the frequencies instead of the four numbers they were made from.

    Every published model uses 1, 4 and 8192 for three of them, and the fourth is the largest divisor; whether that is
    so here is checked against all divisors.
    """
    import numpy as np

    found = {
        "rope_type": "llama3", "factor": float(np.max(divisors)), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    expected = llama3_divisors(found, base, width)
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-3):
        raise ModelError("its rotary frequencies follow no rule that is known here", where=where)
    return found
