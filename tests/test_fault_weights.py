"""Models and adapters whose weights are not as they should be: refused by name, and no run is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_asking import WHOLE, ask, edit_json
from fault_cases import tree
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model


def change_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def poison(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")


def drop(tensors: dict[str, Any]) -> None:
    tensors.pop("model.layers.0.input_layernorm.weight")


UNFIT: dict[str, tuple[Callable[[Path], object], str, int, tuple[str, ...]]] = {
    "NaN in the weights": (
        lambda f: change_tensors(f / "model/model.safetensors", poison), "", 4, ("NaN", "layers.1.mlp.up_proj")
    ),
    "a tensor is missing": (
        lambda f: change_tensors(f / "model/model.safetensors", drop), "", 4, ("missing: model.layers.0.input_layer",)
    ),
    "a rank above the maps": (lambda f: None, "method.rank=33", 2, ("method.rank", "33", "at most")),
    "an enormous rank": (lambda f: None, "method.rank=1000000000", 2, ("method.rank", "at most")),
    "a regex that matches nothing": (lambda f: None, '"method.targets=[\'.*x9\']"', 2, ("method.targets",)),
    "more layers than there are": (
        lambda f: None, "'method={kind: top_layers, layers: 9}'", 2, ("method.layers", "9", "2")
    ),
    "a metric without its program": (
        lambda f: os.environ.update(PATH="/nowhere"), "'evaluate.metrics=[meteor]'", 2, ("meteor",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_only_the_model_can_tell_leaves_no_run_behind(
    begin: Any, good: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a run folder that stays after a mistake, so that the mended configuration is refused."""
    change, overrides, code, words = UNFIT[name]
    folder = begin(good)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    change(folder)
    before = tree(folder)
    ask(f"tune c.yaml {overrides}", code, *words)
    left = set(tree(folder)) - set(before)
    assert left <= {"run", "run/.lock"}
    ask("tune c.yaml --resume", 4, "nothing to resume")


def grow(tensors: dict[str, Any]) -> None:
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = torch.cat([tensors[name]] * 2)


def rename(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "w_proj")] = tensors.pop(name)


def another_base(folder: Path) -> None:
    tiny_model("llama", seed=5, vocab_size=400).save_pretrained(folder / "model")
    edit_json(folder / "run/adapter/adapter_config.json", base_model_name_or_path=str(folder / "model"))


ADAPTERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another base": (another_base, ("another base model", "fingerprint")),
    "another rank": (lambda f: change_tensors(f / WHOLE, grow), ("lora_A", "[4, 32] instead of [2, 32]")),
    "other names": (lambda f: change_tensors(f / WHOLE, rename), ("missing", "unexpected", "q_proj", "w_proj")),
    "cut off": (lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:200]), ("damaged", WHOLE)),
    "no tensors": (lambda f: (f / WHOLE).unlink(), ("missing", WHOLE)),
    "a pickle": (lambda f: (f / WHOLE).rename((f / WHOLE).with_suffix(".bin")), ("missing", "pickle", "safetensors")),
    "config is no JSON": (
        lambda f: (f / "run/adapter/adapter_config.json").write_text("{"), ("adapter_config.json", "not valid JSON")
    ),
    "config is a list": (lambda f: (f / "run/adapter/adapter_config.json").write_text("[]"), ("adapter_config.json",)),
    "NaN": (
        lambda f: change_tensors(f / WHOLE, lambda t: [v.fill_(float("nan")) for v in t.values()]), ("NaN", WHOLE)
    ),
    "unknown method": (
        lambda f: edit_json(f / "run/adapter/adapter_config.json", peft_type="QUERY", tunesmith_method=None),
        ("QUERY", "adapter_config.json"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(begin: Any, finished: Path, name: str) -> None:
    """Kills: loading an adapter of another model, rank or name in part, or with fresh numbers instead."""
    change, words = ADAPTERS[name]
    folder = begin(finished)
    change(folder)
    ask("generate run --prompt x --max-tokens 2", 4, *words)
    ask("export run out --to merged", 4)
    assert not (folder / "out").exists()
