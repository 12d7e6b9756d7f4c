"""The models that published counts are about, on the meta device: shapes and names, no weights.

Each is built once, and a method is attached to it as to any model; what is counted is what would train.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.adapt.methods import METHODS

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}

SUBJECTS: dict[str, dict[str, Any]] = {
    "gpt3": _GPT2 | {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "roberta-base": _ROBERTA
    | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "roberta-large": _ROBERTA
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "deberta-xxl": {"model_type": "deberta-v2", "vocab_size": 128100, "type_vocab_size": 0}
    | {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144}
    | {"relative_attention": True, "position_buckets": 256, "max_relative_positions": -1, "norm_rel_ebd": "layer_norm"}
    | {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    | {"conv_kernel_size": 3, "conv_act": "gelu"},
    "t5-xxl": {"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64}
    | {"num_layers": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def trains(subject: str, kind: str, **settings: Any) -> Callable[[], int]:
    """How many numbers a method trains on a model: a function, so that nothing is built before it is asked."""
    return lambda: _trained(loaded(subject), kind, settings)


def trains_of_map(inputs: int, outputs: int, **settings: Any) -> int:
    """How many numbers LoRA trains for one linear map."""
    return _trained(_one_map(inputs, outputs), "lora", {"targets": ["map"], **settings})


def size(subject: str) -> int:
    """How many numbers a model has, shared ones once."""
    return sum(parameter.numel() for parameter in loaded(subject).model.parameters())


@cache
def loaded(subject: str) -> Loaded:
    """A model of the table on the meta device."""
    import torch
    import transformers

    from tunesmith.models.families import family_of
    from tunesmith.models.load import Loaded, quiet

    settings = dict(SUBJECTS[subject])
    with quiet(), torch.device("meta"):
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        kinds = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModel", "seq2seq": "AutoModelForSeq2SeqLM"}
        model = getattr(transformers, kinds[family_of(config).kind]).from_config(config)
    return Loaded(model.eval(), Path(subject), subject, family_of(config), config)


@cache
def _one_map(inputs: int, outputs: int) -> Any:
    from torch import nn

    from tunesmith.models.families import Family
    from tunesmith.models.load import Loaded

    model: Any = nn.ModuleDict({"map": nn.Linear(inputs, outputs, bias=False, device="meta")})
    config: Any = None
    return Loaded(model, Path("map"), "map", Family("map"), config)


def _trained(subject: Loaded, kind: str, settings: dict[str, Any]) -> int:
    adapter = METHODS.load(kind).model_validate({"kind": kind, **settings}).attach(subject)
    found = sum(parameter.numel() for parameter in adapter.parameters.values())
    if kind != "full":  # which adds nothing that could be taken off
        adapter.detach()
    return found
