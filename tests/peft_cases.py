"""A case for every bridged type: settings with which it fits tiny models, and peft's own model beside ours."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.utils import PeftType
from tiny_models import IDS, tiny_model

from tunesmith.adapt.peft_bridge import ENCODERS, LAYERS, Peft
from tunesmith.adapt.peft_config import TASKS

PLACES = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
OTHER_PLACES = {
    "LN_TUNING": {"llama": ["norm", "input_layernorm"], "bert": ["LayerNorm"]},
    "TRAINABLE_TOKENS": {"llama": ["embed_tokens"], "bert": ["word_embeddings"]},
}
# what makes a type fit maps of 32 features
SIZES: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2}, "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3}, "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_tokens_type_mask": [1, 2, 3]},
    "DEFT": {"r": 4}, "FOURIERFT": {"n_frequency": 20}, "FROD": {"progressbar": False}, "GLORA": {"r": 2},
    "GRALORA": {"r": 4}, "MISS": {"r": 4}, "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3},
    "OFT": {"oft_block_size": 0, "r": 4}, "OSF": {"effective_rank": 8}, "PEANUT": {"r": 4}, "POLY": {"r": 4},
    "PSOFT": {"r": 4}, "PVERA": {"r": 8}, "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 8}, "ROAD": {"group_size": 8}, "SHIRA": {"r": 2}, "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "UNILORA": {"r": 4, "theta_d_length": 64}, "VBLORA": {"r": 4, "num_vectors": 12, "vector_length": 4},
    "VERA": {"r": 8}, "WAVEFT": {"n_frequency": 20},
}  # fmt: skip
# as peft begins: the base up to rounding, or not the base
NEAR_STARTS = {"DEFT", "FROD", "HRA", "OSF"}
OTHER_STARTS = {"C3A", "FOURIERFT", "UNILORA", "VBLORA", *ENCODERS}
# peft has it for decoders alone
DECODERS_ONLY = {"CPT", "MULTITASK_PROMPT_TUNING"}


def cases(*families: str) -> list[tuple[str, str]]:
    """Each type on each family that it is for."""
    both = [(kind, family) for kind in LAYERS + ENCODERS for family in families]
    return [(kind, family) for kind, family in both if family == "llama" or kind not in DECODERS_ONLY]


def bridged(kind: str, family: str = "llama", **more: Any) -> Peft:
    """The method of a type, at two maps of each block or where it belongs."""
    places = {"target_modules": OTHER_PLACES.get(kind, PLACES)[family]} if kind in LAYERS else {}
    return Peft(type=kind, config={**places, **SIZES.get(kind, {}), **more})


def fresh(kind: str, family: str = "llama", **more: Any) -> Any:
    """peft's own model of a case."""
    own = ({"total_step": 9} if kind == "ADALORA" else {}) | bridged(kind, family, **more).config
    encoder = {"task_type": "FEATURE_EXTRACTION"} if kind in ENCODERS else {}
    task = encoder if family == "bert" else {"task_type": TASKS["decoder"]}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**own, **task)
    return peft.get_peft_model(tiny_model(family), config).eval()


def said_by(theirs: Any, kind: str) -> torch.Tensor:
    """What peft's model answers, of the tokens alone."""
    task = {"task_ids": torch.zeros(len(IDS), dtype=torch.int64)}
    call = theirs.base_model if kind == "POLY" else theirs  # which of an encoder knows no tasks
    output = call(input_ids=IDS, **(task if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}))
    found: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found[:, -IDS.shape[1] :]


def trained_by(theirs: Any) -> dict[str, torch.nn.Parameter]:
    """What trains in a model of peft's, by its names."""
    return {name: value for name, value in theirs.named_parameters() if value.requires_grad}
