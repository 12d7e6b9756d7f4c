"""Random models of every family, small enough for a test, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tunesmith.adapt.adapter import Adapter
from tunesmith.core.problem import Problem
from tunesmith.core.types import Batch
from tunesmith.models.families import FAMILIES, Family, family_of
from tunesmith.models.soft import roomy

torch.set_num_threads(1)

VOCABULARY = 97
IDS = torch.arange(3, 14)[None]
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SHARED | {"num_key_value_heads": 2}
_NARROW = _GROUPED | {"head_dim": 8}
_BERT = _SHARED | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NAMES = {key: _SHARED[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 5},
    "qwen2": _GROUPED
    | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True},
    "qwen3": _NARROW,
    "gemma": _NARROW,
    "gemma2": _NARROW
    | {"query_pre_attn_scalar": 6, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "sliding_window": 5},
    "gemma3_text": _NARROW
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "final_logit_softcapping": 1.5},
    "smollm3": _GROUPED,
    "granite": _GROUPED | {"logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
    "olmo2": _GROUPED,
    "cohere": _GROUPED | {"logit_scale": 0.25},
    "starcoder2": _GROUPED | {"sliding_window": None},
    "gpt2": _NAMES
    | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "phi": _SHARED,
    "phi3": _GROUPED,
    "opt": _NAMES
    | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    | {"word_embed_proj_dim": 32, "max_position_embeddings": 96, "dropout": 0.0},
    "gpt_neox": _SHARED,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"pad_token_id": 1},
    "distilbert": _NAMES
    | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 96}
    | {"dropout": 0.0, "attention_dropout": 0.0},
    "deberta-v2": _BERT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    | {"max_relative_positions": -1},
    "mpnet": _BERT | {"pad_token_id": 1},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
}
# families without a table entry
UNKNOWN: dict[str, dict[str, Any]] = {"falcon": _SHARED | {"attention_dropout": 0.0, "hidden_dropout": 0.0}}
FAMILY_NAMES = [*DECODERS, *ENCODERS, *SEQ2SEQ]
QUICK = ("llama", "gemma2", "gpt2", "bert", "t5")  # as unlike each other as there are


def families(*names: str) -> list[Any]:
    """Parameters of a test: the quick check takes those of `QUICK`, and `make test` all."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@dataclass
class TinyLoaded:
    """What `models.load` answers, without files."""

    model: PreTrainedModel
    folder: Path
    name: str
    family: Family
    fingerprint: str
    config: Any
    predicts: Problem | None = None
    base: Any = "same"


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a tiny model of a family."""
    table = DECODERS | ENCODERS | SEQ2SEQ | UNKNOWN
    return AutoConfig.for_model(family, **(table[family] | changes))


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in evaluation mode; weights are large enough for logits to differ."""
    config = tiny_config(family, **changes)
    kind = AutoModel if family in ENCODERS else AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            else:
                parameter.data = 0.15 * torch.randn_like(parameter)
    for parameter in model.parameters():  # not buffers: transformers keeps rotary frequencies in float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_loaded(family: str = "llama", folder: Path | str = ".", **changes: Any) -> TinyLoaded:
    """A tiny model as the rest of the program gets it."""
    model = tiny_model(family, **changes)
    return TinyLoaded(model, Path(folder), f"tiny-{family}", family_of(model.config, model), "f" * 64, model.config)


def with_exact_norms(loaded: TinyLoaded) -> TinyLoaded:
    """The same with norms in the dtype of the model: in float64, transformers computes them in float32."""
    for module in loaded.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm_of(module)
    return loaded


def _norm_of(norm: Any) -> Any:
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    offset = float("Gemma" in type(norm).__name__)
    return lambda x: (norm.weight + offset) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def tiny_batch(lengths: tuple[int, ...] = (7, 3, 9), seed: int = 0, vocabulary: int = VOCABULARY) -> Batch:
    """Documents of random tokens, the first two of each not supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (sum(lengths),), generator=draw)
    positions = torch.cat([torch.arange(length) for length in lengths])
    last = torch.zeros(len(ids), dtype=torch.bool)
    last[torch.tensor(lengths).cumsum(0) - 1] = True
    sources = torch.nonzero((positions >= 1) & ~last)[:, 0]
    rows = tuple(f"row:{index}" for index in range(len(lengths)))
    return Batch(ids, positions, lengths, sources, ids[sources + 1], rows)


def one_document(batch: Batch, index: int) -> Batch:
    """One document of a batch, alone."""
    start = sum(batch.lengths[:index])
    end = start + batch.lengths[index]
    mine = (batch.sources >= start) & (batch.sources < end)
    return Batch(
        batch.ids[start:end],
        batch.positions[start:end],
        (batch.lengths[index],),
        batch.sources[mine] - start,
        batch.targets[mine],
        (batch.rows[index],),
    )


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every base tensor of a model as bytes, for comparisons that forgive nothing."""
    from tunesmith.models.ports import base_state

    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.dim()
        else repr(tensor).encode()
        for name, tensor in base_state(model).items()
    }


def roles_of(family: str) -> tuple[str, ...]:
    """The roles of a tiny model that are maps; a plain t5 has no gate."""
    return tuple(role for role in FAMILIES[family].roles if role != "norm" and (family, role) != ("t5", "gate"))


def answers(loaded: TinyLoaded) -> torch.Tensor:
    """What a model says of fixed tokens."""
    more = {"decoder_input_ids": IDS} if loaded.family.kind == "seq2seq" else {}
    # with room for soft tokens, where some act
    with torch.no_grad(), roomy(loaded.model, None, list(IDS)) as texts:
        output = loaded.model(input_ids=torch.stack(texts), **more)
    found: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found[:, -IDS.shape[1] :]


def disturb(adapter: Adapter, seed: int = 0, size: float = 0.1) -> None:
    """Gives an adapter something to say."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.normal_(std=size, generator=draw)
