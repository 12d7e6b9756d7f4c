"""Reading a GGUF file: converted once into a Hugging Face folder in the cache, and used from there.

The one idea: quantised blocks become float32 once, exactly, tensor by tensor. float32 because a 4-bit block
is a scale times a small integer plus an offset, which bfloat16 cannot hold; disk is cheaper than a silent
rounding. The names of tensors are in `gguf_layout.py`, the tokenizer in `gguf_tokenizer.py`.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.core.files import atomic_folder, cache_folder, os_error, sha256_file
from tunesmith.core.progress import Progress, progress_bar
from tunesmith.models.gguf_config import config_of, heads_of
from tunesmith.models.gguf_layout import LAYOUTS, Layout
from tunesmith.models.gguf_tokenizer import write_tokenizer
from tunesmith.models.weights import TensorSpec, write_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

VERSION = 1  # of the conversion: part of the folder's name, so that a mended converter converts again


def convert_gguf(path: Path | str) -> Path:
    """The Hugging Face folder of a GGUF file, in the cache under a name that holds the file's SHA-256.

    Raises:
        ModelError: not a whole GGUF file, or of an architecture that neither we nor transformers can read.
        ResourceError: no room for the result.
    """
    path = Path(path)
    _check_start(path)
    digest = sha256_file(path)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)[:60]
    folder = models_folder() / f"{stem}-{digest[:16]}-v{VERSION}"
    if (folder / "config.json").is_file():  # folders appear whole or not at all
        return folder
    with one_process(folder.parent):
        if not (folder / "config.json").is_file():
            with atomic_folder(folder) as work:
                write_folder(path, work, name=path.name, sha256=digest)
    return folder


def write_folder(path: Path, work: Path, *, name: str, sha256: str) -> None:
    """Converts a GGUF file into an existing folder; raises as `convert_gguf` does.

    Args:
        name: what the model is called in messages, and in tunesmith.json, which says where the folder came from.
        sha256: of what it came from.
    """
    _check_start(path)
    reader, metadata = _open(path)
    architecture = metadata.get("general.architecture", "")
    layout = LAYOUTS.get(architecture)
    if layout is None or metadata.get(f"{architecture}.expert_count"):
        _convert_by_transformers(path, work, architecture)
    else:
        config = _config(reader, metadata, layout, path)
        _write_weights(reader, metadata, layout, work, name, str(path))
        (work / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    _write_generation_config(metadata, work)
    write_tokenizer(metadata, work, str(path))
    note = {"name": name, "from": "gguf", "sha256": sha256, "conversion": VERSION}
    (work / "tunesmith.json").write_text(json.dumps(note, indent=1), "utf-8")


def _config(reader: GGUFReader, metadata: dict[str, Any], layout: Layout, path: Path) -> dict[str, Any]:
    try:
        return config_of(reader, metadata, layout, str(path))
    except KeyError as error:
        raise ModelError(f"its metadata lacks {error}", where=str(path)) from error


def models_folder() -> Path:
    """Where converted models are kept."""
    return cache_folder() / "models"


def _check_start(path: Path) -> None:
    try:
        with open(path, "rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise os_error(path, error) from error
    if start != b"GGUF":
        raise ModelError("not a GGUF file" if start else "the file is empty", where=str(path))


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Waits while another process converts into the same folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if isinstance(error, TunesmithError):
            raise
        raise os_error(folder, error) from error


def _open(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        return reader, {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(f"damaged or cut off GGUF file ({error})", where=str(path), hint="fetch it again") from error


def _write_weights(
    reader: GGUFReader, metadata: dict[str, Any], layout: Layout, work: Path, name: str, where: str
) -> None:
    import numpy as np
    from gguf.quants import dequantize

    heads, key_heads = heads_of(metadata)
    names = layout.names(int(metadata[f"{metadata['general.architecture']}.block_count"]))
    wanted = [(found, _target(found.name, names, where)) for found in reader.tensors if found.name not in _DERIVED]
    shapes = [tuple(int(size) for size in reversed(tensor.shape)) for tensor, _ in wanted]
    specs = [
        TensorSpec(target, "F32", shape[::-1] if layout.transposes(tensor.name) else shape)
        for (tensor, target), shape in zip(wanted, shapes, strict=True)
    ]
    total = sum(spec.size_bytes for spec in specs)

    def contents(progress: Progress) -> Iterator[memoryview]:
        done = 0
        for (tensor, _), shape, spec in zip(wanted, shapes, specs, strict=True):
            array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
            array = layout.to_hugging_face(tensor.name, array, heads, key_heads)
            yield np.ascontiguousarray(array, dtype="<f4").reshape(-1).data
            done += spec.size_bytes
            progress(done, total)

    with progress_bar(f"converting {name}", total) as progress:
        write_tensors(work / "model.safetensors", specs, contents(progress))


# computed again by every reader: the rotary frequencies
_DERIVED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def _target(name: str, names: dict[str, str], where: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem not in names or suffix not in ("weight", "bias"):
        raise ModelError(f"the tensor {name[:100]!r} has no place in this architecture", where=where)
    return f"{names[stem]}.{suffix}"


def _write_generation_config(metadata: dict[str, Any], work: Path) -> None:
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {key: metadata.get(f"tokenizer.ggml.{role}_token_id") for role, key in ids.items()}
    found = {key: value for key, value in found.items() if value is not None}
    (work / "generation_config.json").write_text(json.dumps(found, indent=1), "utf-8")


def _convert_by_transformers(path: Path, work: Path, architecture: str) -> None:
    """The slow way, for architectures that are not in our table; needs torch and accelerate."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from tunesmith.models.load import quiet

    try:
        with quiet(), progress_bar(f"converting {path.name}"):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True,
                quantization_config=GgufConfig(dequantize=True),
            )  # fmt: skip
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(work)
    except (ValueError, NotImplementedError, KeyError, RuntimeError, ImportError) as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"the GGUF architecture {architecture!r} cannot be read ({line})",
            where=str(path),
            hint=f"read directly are {' '.join(LAYOUTS)}; or use the model's Hugging Face folder",
        ) from error
