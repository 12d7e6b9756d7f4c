"""Small models of several families, with and without something low-rank beside them, for the planner's tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_tokenizer_folder
from torch import nn

SMALL = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 160,
    },
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "vocab_size": 96,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    },
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 96},
}


def small_config(family: str, **changes: object):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SMALL[family], **changes})


def small_model(family: str, device: str = "cpu", **changes: object) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if family in ("bert", "distilbert", "t5") else AutoModelForCausalLM
    with torch.device(device):
        return kind.from_config(small_config(family, **changes))


def loss_of(model: nn.Module):
    """Cross-entropy of a decoder at supervised positions only, as the trainer asks for it."""

    def loss(batch):
        positions = batch.positions[None]
        hidden = model.model(input_ids=batch.ids[None], position_ids=positions, use_cache=False)[0][0]
        return nn.functional.cross_entropy(model.lm_head(hidden[batch.sources]).float(), batch.targets)

    return loss


class LowRank(nn.Module):
    """A frozen linear map with a low-rank delta beside it, as small as it can be written."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def with_low_rank(model: nn.Module, rank: int = 2) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, rank)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj, rank)
    return model


def saved_model(family: str, folder: Path) -> Path:
    """A folder that `load` and `meta` open."""
    tiny_tokenizer_folder(folder)
    small_model(family, vocab_size=384).save_pretrained(folder)
    return folder
