"""What the parts of each model family are called: one table entry a family.

The one idea: a role (q, k, v, o, gate, up, down, embed, head, norm) means the same everywhere, so that a method never
names a module. Needs no torch. Targets are matched in `targets.py`, unknown families guessed in `unknown.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "attn", "mlp", "embed", "head", "norm")
GROUPS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}

Kind = Literal["decoder", "encoder", "seq2seq"]


@dataclass(frozen=True)
class Family:
    """The role table of a family.

    Attributes:
        name: `model_type` of its config.json.
        kind: decoder, encoder or seq2seq.
        blocks: names of the module lists that hold the blocks, as path suffixes.
        inside: role to names of modules within a block; several where a block has several or variants differ.
        outside: role to path suffixes outside the blocks.
        fused: name of a map within a block to (the roles it holds, how their rows lie: equal, heads or grouped).
        packed: attention goes through the transformers interface, so that documents can lie end to end.
        head: hidden states times the head are the logits, up to the scale and cap that the config names.
        pad_offset: position ids start one above `pad_token_id` (roberta's convention).
    """

    name: str
    kind: Kind = "decoder"
    blocks: tuple[str, ...] = ()
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    packed: bool = False
    head: bool = False
    pad_offset: bool = False

    @property
    def table(self) -> bool:
        """Whether the family has an entry here, rather than a guess."""
        return FAMILIES.get(self.name) is self

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that this family has, in the usual order."""
        held = {role for roles, _ in self.fused.values() for role in roles}
        held |= set(self.inside) | set(self.outside)
        held |= {group for group, parts in GROUPS.items() if held & set(parts)}
        return tuple(role for role in ROLES if role in held)

    def __hash__(self) -> int:
        return hash(self.name)


def _llama(name: str, norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm"), **more: Any) -> Family:
    inside: dict[str, tuple[str, ...]] = {role: (f"self_attn.{role}_proj",) for role in "qkvo"}
    inside |= {role: (f"mlp.{role}_proj",) for role in ("gate", "up", "down")}
    inside["norm"] = tuple(norms)
    outside = {"embed": ("embed_tokens",), "head": ("lm_head",), "norm": ("norm",)}
    return replace(Family(name, "decoder", ("layers",), inside, outside, packed=True, head=True), **more)


def _bert(name: str, query: str, key: str, value: str, out: str = "attention.output.dense", **more: Any) -> Family:
    inside: dict[str, tuple[str, ...]] = {"q": (query,), "k": (key,), "v": (value,), "o": (out,)}
    inside |= {"up": ("intermediate.dense",), "down": ("output.dense",)}
    inside["norm"] = ("attention.output.LayerNorm", "attention.LayerNorm", "output.LayerNorm")
    outside = {"embed": ("embeddings.word_embeddings",), "norm": ("embeddings.LayerNorm",)}
    return replace(Family(name, "encoder", ("encoder.layer",), inside, outside, packed=True), **more)


def _two_layer(name: str, blocks: str, attention: str, out: str, up: str, down: str, norms: Sequence[str]) -> Family:
    inside: dict[str, tuple[str, ...]] = {role: (f"{attention}.{role}_proj",) for role in "qkv"}
    inside |= {"o": (f"{attention}.{out}",), "up": (up,), "down": (down,), "norm": tuple(norms)}
    outside = {"embed": ("embed_tokens",), "head": ("lm_head",)}
    return Family(name, "decoder", (blocks,), inside, outside, packed=True, head=True)


_SELF = "attention.self."
_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_Q_K_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_PHI3_NORMS = {"norm": _LLAMA_NORMS}
_T5_MLP = "DenseReluDense"


def _t5(name: str) -> Family:
    attentions = ("layer.0.SelfAttention", "layer.1.EncDecAttention")
    inside: dict[str, tuple[str, ...]] = {role: tuple(f"{place}.{role}" for place in attentions) for role in "qkvo"}
    for role, names in {"gate": ("wi_0",), "up": ("wi", "wi_1"), "down": ("wo",)}.items():
        inside[role] = tuple(f"layer.{index}.{_T5_MLP}.{leaf}" for index in (1, 2) for leaf in names)
    inside["norm"] = tuple(f"layer.{index}.layer_norm" for index in (0, 1, 2))
    outside = {
        "embed": ("encoder.embed_tokens", "decoder.embed_tokens"),
        "head": ("lm_head",),
        "norm": ("final_layer_norm",),
    }
    return Family(name, "seq2seq", ("encoder.block", "decoder.block"), inside, outside)


_GPT2 = Family(
    "gpt2",
    "decoder",
    ("h",),
    {"o": ("attn.c_proj",), "up": ("mlp.c_fc",), "down": ("mlp.c_proj",), "norm": ("ln_1", "ln_2")},
    {"embed": ("wte",), "head": ("lm_head",), "norm": ("ln_f",)},
    {"attn.c_attn": (("q", "k", "v"), "equal")},
    packed=True,
    head=True,
)
_NEOX = Family(
    "gpt_neox",
    "decoder",
    ("layers",),
    {"o": ("attention.dense",), "up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",), "norm": _LLAMA_NORMS},
    {"embed": ("embed_in",), "head": ("lm_head", "embed_out"), "norm": ("final_layer_norm",)},
    {"attention.query_key_value": (("q", "k", "v"), "heads")},
    packed=True,
    head=True,
)
_PHI3 = _llama(
    "phi3",
    inside={"o": ("self_attn.o_proj",), "down": ("mlp.down_proj",)} | _PHI3_NORMS,
    fused={
        "self_attn.qkv_proj": (("q", "k", "v"), "grouped"),
        "mlp.gate_up_proj": (("gate", "up"), "equal"),
    },
)
_OPT = _two_layer("opt", "layers", "self_attn", "out_proj", "fc1", "fc2", ("self_attn_layer_norm", "final_layer_norm"))
_PHI = _two_layer("phi", "layers", "self_attn", "dense", "mlp.fc1", "mlp.fc2", ("input_layernorm",))
_STARCODER2 = _two_layer("starcoder2", "layers", "self_attn", "o_proj", "mlp.c_fc", "mlp.c_proj", _LLAMA_NORMS)
_DISTILBERT = Family(
    "distilbert",
    "encoder",
    ("transformer.layer",),
    {"q": ("attention.q_lin",), "k": ("attention.k_lin",), "v": ("attention.v_lin",), "o": ("attention.out_lin",)}
    | {"up": ("ffn.lin1",), "down": ("ffn.lin2",), "norm": ("sa_layer_norm", "output_layer_norm")},
    {"embed": ("embeddings.word_embeddings",), "norm": ("embeddings.LayerNorm",)},
    packed=True,
)


def _with_norm(family: Family, suffix: str) -> Family:
    return replace(family, outside={**family.outside, "norm": (suffix,)})


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama("llama"),
        _llama("mistral"),
        _llama("qwen2"),
        _llama("qwen3", (*_LLAMA_NORMS, *_Q_K_NORM)),
        _llama("gemma"),
        _llama("gemma2", _SANDWICH),
        _llama("gemma3_text", (*_SANDWICH, *_Q_K_NORM)),
        _llama("smollm3"),
        _llama("granite"),
        _llama("olmo2", ("post_attention_layernorm", "post_feedforward_layernorm", *_Q_K_NORM)),
        _llama("cohere", ("input_layernorm",)),
        _GPT2,
        _with_norm(_PHI, "final_layernorm"),
        _PHI3,
        _with_norm(_OPT, "decoder.final_layer_norm"),
        _with_norm(_STARCODER2, "norm"),
        _NEOX,
        _bert("bert", _SELF + "query", _SELF + "key", _SELF + "value"),
        _bert("roberta", _SELF + "query", _SELF + "key", _SELF + "value", pad_offset=True),
        _DISTILBERT,
        _bert("deberta-v2", _SELF + "query_proj", _SELF + "key_proj", _SELF + "value_proj", packed=False),
        _bert(
            "mpnet", "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
            packed=False, pad_offset=True,
        ),
        _t5("t5"),
        _t5("mt5"),
    )
}  # fmt: skip


def family_of(config: Any, model: nn.Module | None = None) -> Family:
    """The role table for a config (a transformers config or a parsed config.json).

    An unknown family gets a table made from the module names of `model`: blocks are its longest list of like
    modules, and roles are guessed by common names. It runs padded, through its own forward.
    """
    name = str(setting(config, "model_type") or "unknown")
    if name in FAMILIES:
        return FAMILIES[name]
    kind: Kind = "seq2seq" if setting(config, "is_encoder_decoder") else "decoder"
    if model is None:
        return Family(name, kind)
    from tunesmith.models.unknown import guess

    return guess(name, kind, model)


def setting(config: Any, *names: str) -> Any:
    """The first of several settings that a config has; None when it has none of them."""
    for name in names:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if found is not None:
            return found
    return None
