"""Loads a model: the folder checked first, the weights checked after, and nothing on stderr in between.

The one idea: a model that loads is the one that was saved. Missing, extra, misshapen or non-finite tensors are errors
that name them, never a silent random initialisation. Names become folders in `source.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from tunesmith.core.errors import ModelError, ResourceError, TunesmithError
from tunesmith.core.problem import Problem
from tunesmith.kernels.quantized import Kind, Quantized
from tunesmith.models import attention
from tunesmith.models.families import Family, family_of
from tunesmith.models.folder import fingerprint, validate_folder, weight_files
from tunesmith.models.onednn import bound_caches
from tunesmith.models.quantize import hold_as_codes, quantisable
from tunesmith.models.reading import cast_state
from tunesmith.models.source import resolve
from tunesmith.models.stored import stored_places

Dtype = Literal["fp32", "bf16", "fp16"]
Base = Literal["same", "bf16", "int8", "nf4"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what a saved model says it is -> the class to load it with; otherwise its kind decides
_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
_KINDS = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModel", "seq2seq": "AutoModelForSeq2SeqLM"}
# heads of other tasks that encoders are published with; not having them, or having them over, is no damage
_TASK_HEADS = {
    "cls", "pooler", "lm_head", "classifier", "qa_outputs", "vocab_transform", "vocab_layer_norm", "vocab_projector",
    "predictions", "discriminator_predictions", "generator_predictions", "generator_lm_head", "mask_predictions",
    "lm_predictions",
}  # fmt: skip


@dataclass
class Loaded:
    """A model, where it came from and what it is.

    Attributes:
        model: the transformers module.
        folder: the folder it was loaded from.
        name: as the user named it.
        family: its role table.
        config: the transformers config, `model.config`.
        predicts: what the next adapter has a prediction head for; None where it has none.
        base: in what the maps of its blocks are held; `same` where that is the dtype of everything else.
    """

    model: PreTrainedModel
    folder: Path
    name: str
    family: Family
    config: PreTrainedConfig
    predicts: Problem | None = None
    base: Base = "same"

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart; see `folder.fingerprint`."""
        return fingerprint(self.folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer of the folder, opened on first use."""
        with quiet(), _as_model_error(self.folder):
            return transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )


def load(
    source: str | Path, *, dtype: Dtype = "fp32", device: str | torch.device = "cpu", base: Base = "same"
) -> Loaded:
    """Loads a model, in eval mode.

    Args:
        source: a bundled name, folder, GGUF file or hub id; see `source.resolve`.
        dtype: what its floating-point weights become.
        base: what the maps of its blocks are held in, frozen; they are computed with in `dtype`.

    Raises:
        ModelError: no such model; damaged or unfitting files; tensors missing, extra, misshapen, NaN or infinite;
            token ids beyond the embedding.
        ResourceError: it cannot be fetched, or does not fit into memory.
    """
    folder = resolve(str(source))
    validate_folder(folder)
    bound_caches()
    with quiet(), _as_model_error(folder):
        config = _read_config(folder)
        model, info = _read_model(folder, config, DTYPES[dtype], _kind(base, dtype))
        family = family_of(model.config, model)
        _check_loading(info, family, folder)
        _check_finite(model, folder)
        if family.packed:
            attention.use(model)
        model = model.to(device).eval()
    return Loaded(model, folder, str(source), family, model.config, base=base)


def meta(source: str | Path, *, dtype: Dtype = "fp32", base: Base = "same") -> Loaded:
    """The model on the meta device, from its config alone: shapes and names without weights, for planning.

    Tied weights are one parameter, so `sum(p.numel() for p in model.parameters())` counts them once.

    Raises:
        ModelError: no such model, or no usable config.
    """
    folder = resolve(str(source))
    with quiet(), _as_model_error(folder), torch.device("meta"):
        config = _read_config(folder)
        model = _auto_class(config).from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
        family = family_of(model.config, model)
        if family.packed:
            attention.use(model)
        kind = _kind(base, dtype)
        if kind is not None:
            hold_as_codes(model, quantisable(model), kind, DTYPES[dtype], {})
    return Loaded(model.eval(), folder, str(source), family, model.config, base=base)


def _kind(base: Base, dtype: Dtype) -> Kind | None:
    """How maps are held; None where that is the dtype of everything else."""
    return None if base in ("same", dtype) else base  # type: ignore[return-value]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from writing bars and warnings; what matters is checked and told by us."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """What transformers raises about a user's files is of many kinds; here it is one, in one line."""
    try:
        yield
    except TunesmithError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError("not enough memory for the model", where=str(folder)) from error
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"transformers cannot load it: {text[:300]}", where=str(folder)) from error


def _read_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, base: Kind | None
) -> tuple[Any, dict[str, Any]]:
    """The model, maps held as `base` says, and what transformers says of its tensors."""
    auto = _auto_class(config)
    how: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "ignore_mismatched_sizes": True,  # reported by the caller, all at once
        "output_loading_info": True,
    }
    kind: Any = auto._model_mapping[type(config)]
    keep = {
        *(kind._keep_in_fp32_modules_strict or ()),
        *((kind._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()),
    }
    files, places = weight_files(folder), {}
    if base is not None:
        with torch.device("meta"):
            bare = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        shapes, stored = (
            {name: bare.get_parameter(name).shape for name in quantisable(bare)},
            stored_places(bare, files),
        )
        places = {name: stored[name] for name in shapes if name in stored and stored[name][1].shape == shapes[name]}
    state = cast_state(files, dtype, keep, {spec.name for _, spec in places.values()})
    if state is None:
        found = auto.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, **how
        )
    else:
        found = kind.from_pretrained(None, state_dict=state, **how)
    model, info = found
    if base is not None:
        hold_as_codes(model, quantisable(model), base, dtype, places)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, info


def _read_config(folder: Path) -> PreTrainedConfig:
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _auto_class(config: PreTrainedConfig) -> Any:
    saved = (getattr(config, "architectures", None) or [""])[0]
    for ending, name in _CLASSES.items():
        if saved.endswith(ending):
            return getattr(transformers, name)
    return getattr(transformers, _KINDS[family_of(config).kind])


def _check_loading(info: dict[str, Any], family: Family, folder: Path) -> None:
    def damaging(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if not (family.kind == "encoder" and _is_task_head(name)))

    misshapen = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    lists = {
        "missing": damaging(info["missing_keys"]),
        "not in the model": damaging(info["unexpected_keys"]),
        "misshapen": sorted(misshapen),
    }
    told = [f"{what}: {_first(names)}" for what, names in lists.items() if names]
    if told:
        raise ModelError(
            "the weights do not fit the config; tensors " + "; ".join(told),
            where=str(folder),
            hint="config.json and weights must come from the same model",
        )


def _is_task_head(name: str) -> bool:
    return bool(_TASK_HEADS & set(name.split(".")[:2]))


def _check_finite(model: nn.Module, folder: Path) -> None:
    bad = []
    for name, parameter in model.named_parameters():
        # one pass without a temporary; only a suspicious sum (fp16 may overflow) needs the exact look
        if isinstance(parameter, Quantized):
            continue  # looked at when it was made
        if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            bad.append(name)
    if bad:
        raise ModelError(f"NaN or infinity in the weights: {_first(bad)}", where=str(folder))


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:120] for name in names[:5]) + more
