"""Writes a model as one GGUF file, for llama.cpp and everything built on it.

The one idea: the same table that reads GGUF writes it (`models/gguf_layout.py`), so a written file reads back equal.
The tokenizer's part is in `gguf_vocabulary.py`; a Hugging Face folder is written in `merged.py`.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.core.files import os_error, sync_folder
from tunesmith.core.progress import Progress, progress_bar
from tunesmith.export.gguf_vocabulary import describe_vocabulary
from tunesmith.export.merged import refuse_existing
from tunesmith.models.families import setting
from tunesmith.models.gguf_layout import ARCHITECTURES, LAYOUTS, Layout

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from tunesmith.models.load import Loaded

GgufType = Literal["f32", "f16", "bf16"]
log = logging.getLogger(__name__)
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # general.file_type, as llama.cpp numbers them


def save_gguf(loaded: Loaded, path: Path | str, *, dtype: GgufType = "f16") -> Path:
    """Writes the weights as they are now (merge adapters first), the sizes and the tokenizer.

    Args:
        path: a file ending in .gguf, or a folder that gets a file of the model's name.
        dtype: of the matrices. f16, the default, is read everywhere and keeps three more bits of a weight than bf16;
            vectors and positions are always f32, as llama.cpp wants them.

    Raises:
        ModelError: the family or its tokenizer has no form in GGUF that is known here; a weight is too large for f16.
        ConfigError: the file exists.
        ResourceError: no room, or not writable.
    """
    layout, architecture = _layout(loaded)
    path = Path(path).expanduser().absolute()
    if path.suffix != ".gguf":
        path = path / f"{Path(loaded.name).name.removesuffix('.gguf')}.gguf"
    refuse_existing(path)
    entries = _entries(loaded, layout, architecture, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=".export.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            _write(loaded, layout, architecture, dtype, entries, Path(beside))
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)
        sync_folder(path.parent)
    except TunesmithError:
        raise
    except OSError as error:
        raise os_error(path, error) from error
    return path


def _layout(loaded: Loaded) -> tuple[Layout, str]:
    name = str(setting(loaded.config, "model_type"))
    if name not in ARCHITECTURES:
        raise ModelError(
            f"the family {name} cannot be written as GGUF; known are {' '.join(ARCHITECTURES)}",
            where=loaded.name,
            hint="export to merged instead",
        )
    layout = LAYOUTS[ARCHITECTURES[name]]
    _refuse_unsaid(loaded, layout)
    if name in ("llama", "qwen3") and (setting(loaded.config, "attention_bias") or setting(loaded.config, "mlp_bias")):
        log.warning("%s has biases: of a GGUF file of %s transformers leaves them out", loaded.name, name)
    return layout, ARCHITECTURES[name]


def _refuse_unsaid(loaded: Loaded, layout: Layout) -> None:
    """GGUF has no place for some settings, and its readers take the usual values."""
    config = loaded.config
    width = setting(config, "head_dim")
    if layout.model_type == "gemma2" and config.num_hidden_layers == 46:
        width = config.hidden_size // config.num_attention_heads
    usual = {
        ("hidden_activation", "hidden_act", "activation_function"): (layout.activation,),
        ("query_pre_attn_scalar",): (width,),
        ("scale_attn_weights",): (True,),
        ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"): (False,),
    }
    for names, allowed in usual.items():
        found = setting(config, *names)
        if found is not None and found not in allowed:
            raise ModelError(
                f"readers of GGUF take {names[0]} to be {allowed[0]} in {layout.model_type}; here it is {found}",
                where=loaded.name,
                hint="export to merged instead",
            )


def _entries(loaded: Loaded, layout: Layout, architecture: str, dtype: str) -> dict[str, Any]:
    """All metadata, by key."""
    config, prefix = loaded.config, architecture + "."
    rope = getattr(config, "rope_parameters", None) or {}
    values = {theirs: setting(config, theirs) for theirs in layout.keys.values()}
    values["rope_theta"] = rope.get("rope_theta")
    if "n_inner" in values:
        values["n_inner"] = values["n_inner"] or 4 * config.n_embd
    window = values.pop("sliding_window", None)
    if window and architecture == "gemma2":
        values["sliding_window"] = window
    elif window:  # readers of the others attend to everything: true as far as the window reaches
        values["max_position_embeddings"] = min(window, values["max_position_embeddings"])
    found = {prefix + ours: values[theirs] for ours, theirs in layout.keys.items() if values.get(theirs) is not None}
    name = Path(loaded.name).name
    # transformers takes a file called just so for another architecture, which it then cannot read
    name = "Mistral" if name == "mistral" else name
    found |= {"general.name": name, "general.file_type": _FILE_TYPES[dtype]}
    embedding: Any = loaded.model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    found[prefix + "vocab_size"] = rows
    if layout.model_type != "gpt2":
        width = setting(config, "head_dim") or config.hidden_size // config.num_attention_heads
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            found[prefix + key] = width
        found |= _rope_entries(rope, prefix, loaded.name)
    return found | describe_vocabulary(loaded.folder, rows)


def _rope_entries(rope: dict[str, Any], prefix: str, where: str) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3's divisors are a tensor
        return {}
    if kind in ("linear", "yarn"):
        found = {prefix + "rope.scaling.type": kind, prefix + "rope.scaling.factor": float(rope["factor"])}
        original = rope.get("original_max_position_embeddings")
        return found | ({prefix + "rope.scaling.original_context_length": original} if original else {})
    raise ModelError(f"rotary scaling of the kind {kind!r} cannot be written as GGUF", where=where)


def _write(loaded: Loaded, layout: Layout, architecture: str, dtype: str, entries: dict[str, Any], path: Path) -> None:
    from gguf import GGUFWriter

    from tunesmith.models.ports import base_state

    names = {theirs: ours for ours, theirs in layout.names(_blocks(loaded)).items()}
    tied = getattr(loaded.config, "tie_word_embeddings", False)
    state = {
        _gguf_name(name, names, loaded.name): tensor
        for name, tensor in base_state(loaded.model).items()
        if not (tied and name == "lm_head.weight")
    }
    writer = GGUFWriter(path, architecture)
    for key, value in entries.items():
        _add(writer, key, value)
    divisors = _llama3_divisors(loaded)
    if divisors is not None:
        _announce(writer, "rope_freqs.weight", divisors.shape, "f32")
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        _announce(writer, name, shape[::-1] if layout.transposes(name) else shape, _type_of(name, tensor, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    total = sum(tensor.numel() for tensor in state.values()) * (4 if dtype == "f32" else 2)
    with progress_bar(f"writing {path.parent.name}", total) as progress:
        _write_tensors(writer, loaded, layout, state, dtype, progress, total)
    writer.close()
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _write_tensors(
    writer: GGUFWriter,
    loaded: Loaded,
    layout: Layout,
    state: dict[str, torch.Tensor],
    dtype: str,
    progress: Progress,
    total: int,
) -> None:
    heads = setting(loaded.config, "num_attention_heads", "n_head")
    key_heads = setting(loaded.config, "num_key_value_heads") or heads
    done = 0
    for name, tensor in state.items():
        array = layout.to_gguf(name, tensor.detach().float().cpu().numpy(), heads, key_heads)
        stored = _stored(array, _type_of(name, tensor, dtype), name)
        writer.write_tensor_data(stored)
        done += stored.nbytes
        progress(min(done, total), total)


def _blocks(loaded: Loaded) -> int:
    return int(setting(loaded.config, "num_hidden_layers", "n_layer"))


def _gguf_name(name: str, names: dict[str, str], where: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem not in names:
        raise ModelError(f"the tensor {name} has no place in a GGUF file of this family", where=where)
    return f"{names[stem]}.{suffix}"


def _type_of(name: str, tensor: torch.Tensor, dtype: str) -> str:
    return dtype if tensor.dim() > 1 and name != "position_embd.weight" else "f32"


def _quantization(dtype: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[dtype.upper()]


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], dtype: str) -> None:
    import numpy as np

    size_bytes = math.prod(shape) * (4 if dtype == "f32" else 2)
    writer.add_tensor_info(name, list(shape), np.dtype(np.float32), size_bytes, _quantization(dtype))


def _stored(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    import numpy as np
    from gguf.quants import quantize

    if dtype == "f16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"{name} has weights beyond f16's range", hint="write bf16 or f32")
    return quantize(np.ascontiguousarray(array), _quantization(dtype))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _llama3_divisors(loaded: Loaded) -> np.ndarray | None:
    """Llama 3 stretches its rotary frequencies; GGUF stores by how much each is divided."""
    import numpy as np

    from tunesmith.models.gguf_config import llama3_divisors

    rope = getattr(loaded.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = setting(loaded.config, "head_dim") or loaded.config.hidden_size // loaded.config.num_attention_heads
    return llama3_divisors(rope, float(rope["rope_theta"]), width).astype(np.float32)
