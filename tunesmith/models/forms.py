"""How the blocks of llama-like model classes differ, as data: what `blocks.py` and `decode.py` ask of a family.

The one idea: a class of transformers is a row of a table here, and nothing asks for its name anywhere else. Where
something stands is said by the name of an attribute; what has no name here is as llama has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Tables = dict[str, tuple[Tensor, Tensor]]  # cosines and sines [tokens, turned], by type of layer


@dataclass(frozen=True)
class Form:
    """The blocks of one class of models.

    Attributes:
        writer: the class with a language head on it.
        offset: what is added to the gain of its norms.
        qkv, inner: maps that share an input, in attention (queries, keys, values) and in the MLP (gate, up).
        between: the norm before the MLP.
        after: what is done to the answers of attention and of the MLP before they are added.
        heads: norms of each head of queries and of keys, before positions turn them; empty for none.
        window: whose `sliding_window` counts: "attention" or "config".
        caps: whether attention caps its scores at its `attn_logit_softcapping`.
        turns: whether positions turn heads in another way in each type of layer.
    """

    writer: str
    offset: float = 0.0
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    inner: tuple[str, ...] = ("gate_proj", "up_proj")
    between: str = "post_attention_layernorm"
    after: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    window: str = "attention"
    caps: bool = False
    turns: bool = False

    def window_of(self, attention: nn.Module) -> int | None:
        """How many tokens a query of an attention module sees, its own with them; None for all before it."""
        held = attention.config if self.window == "config" else attention
        found: int | None = getattr(held, "sliding_window", None)
        return found

    def cap_of(self, attention: nn.Module) -> float | None:
        """Where an attention module caps its scores; None where it does not."""
        found: float | None = getattr(attention, "attn_logit_softcapping", None) if self.caps else None
        return found

    def table_of(self, attention: nn.Module) -> str:
        """Which of the tables turns the heads of an attention module."""
        return str(attention.layer_type) if self.turns else ""

    def tables(self, base: Any, x: Tensor, positions: Tensor) -> Tables:
        """The rotary tables of a model, for x [1, tokens, width] at positions int64 [1, tokens]."""
        kinds = sorted(set(base.config.layer_types)) if self.turns else [""]
        found: Tables = {}
        for kind in kinds:
            cos, sin = base.rotary_emb(x, positions, kind) if self.turns else base.rotary_emb(x, positions)
            found[kind] = cos[0].contiguous(), sin[0].contiguous()
        return found


_SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm")
FORMS = {
    "LlamaModel": Form("LlamaForCausalLM"),
    "MistralModel": Form("MistralForCausalLM", window="config"),
    "Qwen2Model": Form("Qwen2ForCausalLM"),
    "Qwen3Model": Form("Qwen3ForCausalLM", heads=("q_norm", "k_norm")),
    "Phi3Model": Form(
        "Phi3ForCausalLM", qkv=("qkv_proj",), inner=("gate_up_proj",),
        after=("resid_attn_dropout", "resid_mlp_dropout"), window="config",
    ),
    "GemmaModel": Form("GemmaForCausalLM", offset=1.0),
    "Gemma2Model": Form(
        "Gemma2ForCausalLM", offset=1.0, between="pre_feedforward_layernorm", after=_SANDWICH, caps=True
    ),
    "Gemma3TextModel": Form(
        "Gemma3ForCausalLM", offset=1.0, between="pre_feedforward_layernorm", after=_SANDWICH,
        heads=("q_norm", "k_norm"), turns=True,
    ),
}  # fmt: skip
NORMS = {f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2", "Gemma3")}


def form_of(model: Any) -> Form | None:
    """The form of a model's blocks, of a class with or without a head; None where they are not known here."""
    return FORMS.get(type(model.base_model).__name__)


def modules_at(owner: nn.Module, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Some modules of a module."""
    return tuple(getattr(owner, name) for name in names)
