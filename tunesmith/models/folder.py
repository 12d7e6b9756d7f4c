"""Whether a folder holds a usable model, and which one it is: without torch, in milliseconds.

The one idea: everything that can be known from names, headers and JSON is checked before weights are read, and all
problems are told at once. What only the weights can tell is checked in `load.py`.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError, Problems
from tunesmith.core.files import canonical_json, os_error, read_json
from tunesmith.models.weights import TensorSpec, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_TOKENIZERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.ckpt")
_SAMPLE_BYTES = 64
# families that learn one vector a position, and how many rows of that table are set aside
_POSITION_TABLES = {
    "gpt2": 0, "gpt_neo": 0, "gpt_bigcode": 0, "opt": 0, "bert": 0, "distilbert": 0, "electra": 0, "albert": 0,
    "roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2,
}  # fmt: skip
# entries of config.json that say how a copy was stored or is run, not which model it is
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "name_or_path")


def validate_folder(folder: Path | str) -> None:
    """Checks a model folder without reading its weights.

    Looked at are: config.json and its model_type; tokenizer.json, and that no token id lies beyond the embedding; the
    weights: present, as safetensors, with headers that agree with the files' sizes; an index that names only shards
    that are there.

    Raises:
        ModelError: listing every problem found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError("there is no such folder", where=str(folder))
    if not (folder / "config.json").exists():
        raise _no_config(folder)
    problems = Problems()
    config: dict[str, Any] = {}
    for check in (_check_config, _check_tokenizer, _check_weights):
        try:
            check(folder, config)
        except ModelError as error:
            problems.add(error)
    problems.raise_if_any()


def position_limit(config: dict[str, Any]) -> int | None:
    """Tokens of the longest document that a model has positions for; None where positions are computed.

    Args:
        config: what config.json holds.
    """
    places = config.get("max_position_embeddings", config.get("n_positions"))
    reserved = _POSITION_TABLES.get(str(config.get("model_type")))
    return None if reserved is None or not isinstance(places, int) else places - reserved


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model folder, those that the index names where there is one.

    Raises:
        ModelError: there are none, or a shard is missing.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    table = read_json(folder / INDEX, ModelError)
    places = table.get("weight_map") if isinstance(table, dict) else None
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or any(not isinstance(name, str) or "/" in name for name in names):
        raise ModelError("names no shards", where=str(folder / INDEX))
    shards = sorted(set(names))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        listed = " ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(f"missing shards: {listed}", where=str(folder), hint="fetch the model again")
    return [folder / name for name in shards]


def fingerprint(folder: Path | str) -> str:
    """16 hexadecimal digits that tell models apart: by config, tensor names, types, shapes and a sample of the weights.

    Of each tensor 64 bytes at its beginning, middle and end are taken, so a file of any size costs milliseconds, any
    training that touches every tensor shows, and how tensors are spread over shards does not matter. A change of a few
    single weights may go unseen: this tells models apart, it does not certify them.

    Raises:
        ModelError: the weights are missing or damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", ModelError)
    kept = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    digest = hashlib.sha256(canonical_json(kept).encode())
    places = [(spec, path) for path in weight_files(folder) for spec in read_header(path).values()]
    for spec, path in sorted(places, key=lambda place: place[0].name):
        digest.update(f"{spec.name} {spec.dtype} {spec.shape}".encode())
        digest.update(_sample(path, spec))
    return digest.hexdigest()[:16]


def _sample(path: Path, spec: TensorSpec) -> bytes:
    middle = (spec.start + spec.end - _SAMPLE_BYTES) // 2
    try:
        with open(path, "rb") as stream:
            taken = b""
            for at in (spec.start, middle, spec.end - _SAMPLE_BYTES):
                at = max(at, spec.start)
                stream.seek(at)
                taken += stream.read(min(_SAMPLE_BYTES, spec.end - at))
    except OSError as error:
        raise os_error(path, error) from error
    return taken


def _no_config(folder: Path) -> ModelError:
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json", ModelError).get("base_model_name_or_path", "")
        hint = f"`model:` takes the base it was trained on{f': {base}' if base else ''}"
        return ModelError("an adapter, not a model (it has adapter_config.json)", where=str(folder), hint=hint)
    if (folder / "model" / "config.json").exists():
        return ModelError("a run folder, not a model", where=str(folder), hint=f"use {folder / 'model'}")
    if (folder / "adapter" / "adapter_config.json").exists():
        return ModelError("a run folder, not a model", where=str(folder), hint="`export --to merged` makes one of it")
    if any(folder.glob("*.gguf")):
        return ModelError("config.json is missing", where=str(folder), hint="name the .gguf file itself")
    return ModelError("config.json is missing", where=str(folder), hint="name the folder of a Hugging Face checkpoint")


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    read = read_json(path, ModelError)
    if not isinstance(read, dict) or not isinstance(read.get("model_type"), str):
        raise ModelError("has no model_type", where=str(path), hint="fetch the model again")
    config.update(read)


def _check_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    if not path.exists():
        others = [name for name in _OTHER_TOKENIZERS if (folder / name).exists()]
        hint = "fetch it from where the model came from"
        if others:
            hint = f"{others[0]} alone is the slow form: load and save it once with transformers' AutoTokenizer"
        raise ModelError("tokenizer.json is missing", where=str(folder), hint=hint)
    facts = path.stat()
    largest = _largest_id(path, facts.st_mtime_ns, facts.st_size)
    rows = config.get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise ModelError(
            f"has token id {largest}, but the embedding has {rows} rows",
            where=str(path),
            hint="the tokenizer of another model? take the one that came with the weights",
        )


@lru_cache(16)
def _largest_id(path: Path, modified_ns: int, size_bytes: int) -> int:
    """Of a tokenizer; remembered, for a run asks when it prepares and when it loads, and megabytes are parsed."""
    table = read_json(path, ModelError)
    try:
        vocabulary = table["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max([*ids, *(token["id"] for token in table.get("added_tokens") or [])])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ModelError("is no tokenizer (it has no vocabulary)", where=str(path)) from error


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    seen: dict[str, Path] = {}
    for path in weight_files(folder):
        for name in read_header(path):
            if name in seen:
                raise ModelError(f"the tensor {name[:100]!r} is also in {seen[name].name}", where=str(path))
            seen[name] = path
    if not seen:
        raise ModelError("the weights hold no tensors", where=str(folder))


def _no_weights(folder: Path) -> ModelError:
    pickled = [name for name in _PICKLED if (folder / name).exists()]
    if pickled:
        return ModelError(
            f"{pickled[0]} can run code when it is loaded and is refused; only safetensors are read",
            where=str(folder),
            hint="convert it where you trust it: AutoModel.from_pretrained(...).save_pretrained(...)",
        )
    return ModelError(f"{WEIGHTS} is missing", where=str(folder), hint="fetch the model again")
