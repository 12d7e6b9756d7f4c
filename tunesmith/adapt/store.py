"""Adapters on disk: adapter_config.json and adapter_model.safetensors, in PEFT's layout wherever peft has the method.

The one idea: a file fits completely or is refused by name; nothing is skipped and nothing is initialised instead.
What is particular to a method that peft has is in a module of its own, named in the table below; every other method's
tensors are written under the names that `Adapter.parameters` has.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tunesmith.adapt.methods import METHODS
from tunesmith.adapt.peft_bridge import REFUSED
from tunesmith.adapt.peft_bridge import TYPES as BRIDGED
from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.core.files import atomic_folder, canonical_json, read_json
from tunesmith.core.problem import HEAD_KEY, read_problem
from tunesmith.models.heads import fill_head, keep_head, save_head
from tunesmith.models.save import write_model

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OWN = "TUNESMITH_"

# peft's name of a method to the module that reads and writes its files (a `Layout`)
LAYOUTS = {
    "LORA": "tunesmith.adapt.peft_lora",
    "IA3": "tunesmith.adapt.peft_ia3",
    "PROMPT_TUNING": "tunesmith.adapt.peft_prompt",
    "PREFIX_TUNING": "tunesmith.adapt.peft_prompt",
    **dict.fromkeys(BRIDGED, "tunesmith.adapt.peft_bridge"),
}
# kinds of ours that are written in one of these, all others are TUNESMITH_<KIND>; the bridge writes its types alike
PEFT_TYPES = {
    "lora": "LORA",
    "ia3": "IA3",
    "peft": BRIDGED[0],
    "prompt": "PROMPT_TUNING",
    "prefix_layer": "PREFIX_TUNING",
}


class Layout(Protocol):
    """What a module of the table has."""

    def written(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The settings, `peft_type` among them, and the tensors of an adapter as peft wants them."""
        ...

    def read(
        self,
        loaded: Loaded,
        settings: Mapping[str, Any],
        tensors: dict[str, Tensor],
        name: str,
        where: str,
        own: Method | None,
    ) -> Adapter:
        """An adapter from such settings and tensors; `own` is the method where tunesmith wrote them.

        Raises AdapterError; the model is then as it was.
        """
        ...


def save_run(adapter: Adapter, folder: Path) -> Path:
    """Writes `folder/adapter`, or `folder/model` where most of the model itself has been trained."""
    total = sum(parameter.numel() for parameter in adapter.loaded.model.parameters())
    trained = sum(parameter.numel() for parameter in adapter.trained.values())
    if 2 * trained <= total or adapter.inserts():  # a plain model has no place for inserts
        return save_adapter(adapter, folder / "adapter")
    with atomic_folder(folder / "model") as work:
        write_model(adapter.loaded, work)
        if adapter.head is not None:
            keep_head(adapter.head, work)
    return folder / "model"


def save_adapter(adapter: Adapter, folder: Path | str) -> Path:
    """Writes the two files of an adapter, numbers in float32; the folder appears whole or not at all.

    A prediction head is a third file, `predict.safetensors`, with what it predicts under `tunesmith_predict`.

    Raises:
        ResourceError: no room, or not writable.
    """
    folder = Path(folder)
    settings: dict[str, Any] = {
        "base_model_name_or_path": str(adapter.loaded.folder.absolute()),
        "inference_mode": True,
        "tunesmith_base": {
            "name": adapter.loaded.name,
            "fingerprint": adapter.loaded.fingerprint,
            **({} if adapter.loaded.base == "same" else {"held": adapter.loaded.base}),
        },
        "tunesmith_method": adapter.method.model_dump(mode="json"),
    }
    more, tensors = _layout(PEFT_TYPES.get(adapter.method.kind)).written(adapter)
    settings |= more
    ready = {name: _plain(tensors[name]) for name in sorted(tensors)}
    with atomic_folder(folder) as work:
        if adapter.head is not None:
            settings[HEAD_KEY] = save_head(adapter.head, work)
        (work / CONFIG).write_text(canonical_json(settings, indent=2) + "\n", "utf-8")
        (work / TENSORS).write_bytes(save(ready, metadata={"format": "pt"}))
    return folder


def load_adapter(loaded: Loaded, folder: Path | str, name: str = "default") -> Adapter:
    """Puts a saved adapter on a model: one of ours, or a LoRA that peft has written.

    Args:
        folder: where the two files are, or a run folder with `adapter/` in it.

    Raises:
        AdapterError: files are missing or damaged, tensors do not fit, it belongs to another base, or it uses
            something that only peft has.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).exists():
        folder = folder / "adapter"
    settings = read_json(folder / CONFIG, AdapterError)
    if not isinstance(settings, dict):
        raise AdapterError("not a JSON object", where=str(folder / CONFIG))
    _check_base(loaded, settings, folder)
    tensors = _read_tensors(folder)
    kind, own = settings.get("peft_type"), _own_method(settings, folder)
    if kind not in LAYOUTS and (own is None or kind != OWN + own.kind.upper()):
        if kind in REFUSED:
            why, instead = REFUSED[kind]
            raise AdapterError(f"{kind} is not bridged: {why}", where=str(folder / CONFIG), hint=f"instead: {instead}")
        known = " ".join(LAYOUTS)
        raise AdapterError(f"peft_type {kind!r} is not known here", where=str(folder / CONFIG), hint=f"{known} are")
    with _predicting(loaded, settings, folder):
        adapter = _layout(kind).read(loaded, settings, tensors, name, str(folder), own)
    if adapter.head is not None:
        try:
            fill_head(adapter.head, settings[HEAD_KEY], folder)
        except ModelError:
            adapter.detach()
            raise
    return adapter


@contextmanager
def _predicting(loaded: Loaded, settings: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Whatever is attached within gets the head that the settings name, or none."""
    before, asked = loaded.predicts, settings.get(HEAD_KEY)
    loaded.predicts = None if asked is None else read_problem(asked, str(folder / CONFIG))
    try:
        yield
    finally:
        loaded.predicts = before


class _Own:
    """The layout of what peft does not have: tensors by the names that the adapter gives them."""

    def written(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"peft_type": OWN + adapter.method.kind.upper(), "tunesmith_seed": adapter.seed}
        return settings, dict(adapter.changes)

    def read(
        self,
        loaded: Loaded,
        settings: Mapping[str, Any],
        tensors: dict[str, Tensor],
        name: str,
        where: str,
        own: Method | None,
    ) -> Adapter:
        assert own is not None
        adapter = own.attach(loaded, name, settings.get("tunesmith_seed", 0))
        fill(adapter, adapter.changes, tensors, where)
        return adapter


def _layout(kind: Any) -> Layout:
    if kind not in LAYOUTS:
        return _Own()
    module: Any = importlib.import_module(LAYOUTS[kind])
    layout: Layout = module
    return layout


def fill(adapter: Adapter, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies stored tensors into an adapter's, by name. Raises AdapterError where they do not fit, and detaches it."""
    try:
        fits({path: tuple(value.shape) for path, value in wanted.items()}, tensors, where)
    except AdapterError:
        adapter.detach()
        raise
    with torch.no_grad():
        for path, value in wanted.items():
            value.copy_(tensors[path])


def fits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: str) -> None:
    """Checks that tensors are exactly those wanted. Raises AdapterError listing the first five that are not."""
    wrong = [f"missing {name}" for name in wanted if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in wanted]
    for name, shape in wanted.items():
        if name in found and tuple(found[name].shape) != tuple(shape):
            wrong.append(f"{name} is {list(found[name].shape)} instead of {list(shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise AdapterError(
            "the tensors do not fit the model: " + "; ".join(wrong[:5]) + more,
            where=where,
            hint="is it an adapter for this very model, and are both files from the same save?",
        )


def _plain(tensor: Tensor) -> Tensor:
    """As a file has it: whole numbers, which are places, as they are."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _own_method(settings: Mapping[str, Any], folder: Path) -> Method | None:
    raw = settings.get("tunesmith_method")
    if raw is None:
        return None
    try:
        method: Method = METHODS.load(raw["kind"]).model_validate(raw)
    except (ValueError, TypeError, KeyError) as error:
        text = str(error).splitlines()[0]
        raise AdapterError(f"tunesmith_method cannot be read: {text}", where=str(folder / CONFIG)) from error
    return method


def _check_base(loaded: Loaded, settings: Mapping[str, Any], folder: Path) -> None:
    base = settings.get("tunesmith_base")
    if not isinstance(base, dict):
        return  # peft's own: shapes are all there is to check
    wanted = base.get("fingerprint")
    if wanted != loaded.fingerprint:
        raise AdapterError(
            f"it was trained on another base model ({base.get('name')}, fingerprint {str(wanted)[:12]}); this one is "
            f"{loaded.name}, {loaded.fingerprint[:12]}",
            where=str(folder),
            hint=f"load {base.get('name')} below it",
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle and is never opened: save it again as safetensors" if pickled else ""
        raise AdapterError("the file is missing", where=str(path), hint=hint)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"damaged: {error}", where=str(path)) from error
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(f"NaN or infinity in {', '.join(bad[:5])}", where=str(path))
    return tensors
