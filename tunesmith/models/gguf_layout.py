"""How GGUF names things: one table, used for reading (`gguf.py`) and for writing (`export/gguf.py`).

The one idea: a layout is names and a few reversible changes to tensors, so one entry serves both
directions. The GGUF names and changes are those of llama.cpp's converter (ggml-org,
`convert_hf_to_gguf.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# GGUF key below the architecture's name -> key of config.json
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}


@dataclass(frozen=True)
class Layout:
    """One GGUF architecture.

    Attributes:
        model_type, architecture: what config.json calls it.
        outer, block: GGUF name -> Hugging Face name, without `.weight`, outside and inside the blocks.
        blocks: the Hugging Face name of the list of blocks.
        keys: GGUF key -> config key.
        activation: of the feed-forward, which GGUF does not store.
        permuted: rows of q and k are interleaved (the rotary layout of the original llama release).
        norms_plus_one: norm weights are stored with one added.
        transposed: GGUF names of maps that Hugging Face keeps input-major (GPT-2's Conv1D).
    """

    model_type: str
    architecture: str
    outer: dict[str, str]
    block: dict[str, str]
    blocks: str
    keys: dict[str, str]
    activation: str
    permuted: bool = False
    norms_plus_one: bool = False
    transposed: tuple[str, ...] = ()

    def names(self, blocks: int) -> dict[str, str]:
        """GGUF name -> Hugging Face name of each module of so many blocks (without `.weight` or `.bias`)."""
        inner = {
            f"blk.{index}.{ours}": f"{self.blocks}.{index}.{theirs}"
            for index in range(blocks)
            for ours, theirs in self.block.items()
        }
        return self.outer | inner

    def to_hugging_face(self, name: str, array: np.ndarray, heads: int, key_heads: int) -> np.ndarray:
        """A tensor as transformers wants it; `name` is the GGUF name with its `.weight` or `.bias`."""
        if self._permutes(name):
            count = heads if ".attn_q." in name else key_heads
            array = array.reshape(count, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if self._shifts(name):
            array = array - array.dtype.type(1)
        return array.T if self.transposes(name) else array

    def to_gguf(self, name: str, array: np.ndarray, heads: int, key_heads: int) -> np.ndarray:
        """The inverse of `to_hugging_face`."""
        array = array.T if self.transposes(name) else array
        if self._shifts(name):
            array = array + array.dtype.type(1)
        if self._permutes(name):
            count = heads if ".attn_q." in name else key_heads
            array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    def _permutes(self, name: str) -> bool:
        return self.permuted and (".attn_q." in name or ".attn_k." in name)

    def _shifts(self, name: str) -> bool:
        return self.norms_plus_one and name.endswith("norm.weight")

    def transposes(self, name: str) -> bool:
        return name.endswith(".weight") and name.split(".")[-2] in self.transposed


_LLAMA_LIKE = (_OUTER, _BLOCK, "model.layers", _KEYS)
_GEMMA2_KEYS = _KEYS | {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
LAYOUTS = {
    "llama": Layout("llama", "LlamaForCausalLM", *_LLAMA_LIKE, "silu", permuted=True),
    "qwen2": Layout("qwen2", "Qwen2ForCausalLM", *_LLAMA_LIKE, "silu"),
    "qwen3": Layout("qwen3", "Qwen3ForCausalLM", *_LLAMA_LIKE, "silu"),
    "gemma": Layout("gemma", "GemmaForCausalLM", *_LLAMA_LIKE, "gelu_pytorch_tanh", norms_plus_one=True),
    "gemma2": Layout(
        "gemma2", "Gemma2ForCausalLM", _OUTER, _SANDWICH_BLOCK, "model.layers", _GEMMA2_KEYS, "gelu_pytorch_tanh",
        norms_plus_one=True,
    ),
    "gpt2": Layout(
        "gpt2", "GPT2LMHeadModel", _GPT2_OUTER, _GPT2_BLOCK, "transformer.h", _GPT2_KEYS, "gelu_new",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}  # fmt: skip
# model_type of config.json -> GGUF architecture; mistral is llama with a window, which GGUF readers do without
ARCHITECTURES = {layout.model_type: name for name, layout in LAYOUTS.items()} | {"mistral": "llama"}
