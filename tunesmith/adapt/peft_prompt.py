"""Prompts and layer prefixes in the files of the peft library, both ways.

The one idea: peft keeps one tensor, `prompt_embeddings`: of a prompt [length, width]; of a prefix [length, blocks x 2 x
width of the keys], keys before values in each block. What made a prefix (a map of ours, a projection of peft's) is not
in it. Files are opened and written in `store.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.adapt.prefix_layer import PrefixLayer
from tunesmith.adapt.prefix_start import attach_empty
from tunesmith.adapt.prompt import Prompt
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.families import setting
from tunesmith.models.inserts import Keys, SoftTokens

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

NAME = "prompt_embeddings"
_TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensor of an adapter as peft wants them."""
    config = adapter.loaded.config
    heads = int(setting(config, "num_attention_heads", "n_head", "num_heads"))
    settings = {
        "task_type": _TASKS[adapter.loaded.family.kind],
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": int(setting(config, "num_hidden_layers", "n_layer", "num_layers")),
    }
    if isinstance(adapter.method, Prompt):
        vectors: Tensor = _soft(adapter)["vectors"]
        settings |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": vectors.shape[1]}
    else:
        with torch.no_grad():
            parts = [side.states() for pair in _pairs(adapter) for side in pair]
        vectors = torch.cat(parts, 1)
        settings |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "token_dim": parts[0].shape[1]}
        settings["num_attention_heads"] = int(setting(config, "num_key_value_heads") or heads)
        # what it was made by is folded into it
        settings["tunesmith_method"] = PrefixLayer(length=len(vectors)).model_dump(mode="json")
    return settings | {"num_virtual_tokens": len(vectors)}, {NAME: vectors}


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """An adapter from peft's settings and tensor, whoever wrote them.

    Raises:
        AdapterError: a setting is not supported, the tensor does not fit, or the family takes no prefix.
    """
    from tunesmith.adapt.store import fits

    length = settings.get("num_virtual_tokens")
    if not isinstance(length, int) or length < 1:
        raise AdapterError(f"num_virtual_tokens is {length!r}", where=where)
    _refuse(settings, where)
    if settings["peft_type"] == "PROMPT_TUNING":
        adapter = Prompt(length=length).attach(loaded, name)
        parts = [_soft(adapter)["vectors"]]
    else:
        try:
            adapter = attach_empty(PrefixLayer(length=length), loaded, name)
        except ConfigError as error:
            raise AdapterError(str(error), where=where) from error
        parts = [side["vectors"] for pair in _pairs(adapter) for side in pair]
    try:
        widths = [part.shape[1] for part in parts]
        fits({NAME: (length, sum(widths))}, tensors, where)
    except AdapterError:
        adapter.detach()
        raise
    with torch.no_grad():
        for part, values in zip(parts, tensors[NAME].split(widths, 1), strict=True):
            part.copy_(values)
    return adapter


def _soft(adapter: Adapter) -> SoftTokens:
    [insert] = [insert for _, _, insert in adapter.inserts() if isinstance(insert, SoftTokens)]
    return insert


def _pairs(adapter: Adapter) -> list[tuple[Keys, Keys]]:
    """Keys and values of each block, in order."""
    held = [(role, insert) for _, role, insert in adapter.inserts() if isinstance(insert, Keys)]
    sides = [[insert for role, insert in held if role == side] for side in ("k", "v")]
    return list(zip(*sides, strict=True))


def _refuse(settings: Mapping[str, Any], where: str) -> None:
    found = ["modules_to_save"] if settings.get("modules_to_save") else []
    if (settings.get("num_transformer_submodules") or 1) != 1:
        found.append("vectors for the decoder, too (num_transformer_submodules)")
    if found:
        raise AdapterError(f"it uses what is not supported here: {', '.join(found)}", where=where)
