"""Adapters on disk: peft's layout both ways, complete or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_NAMES, TinyLoaded, answers, bits, disturb, families, roles_of, tiny_loaded, tiny_model

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.errors import AdapterError, ConfigError

ROOT = Path(__file__).parent.parent
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = pytest.mark.filterwarnings("ignore")


def based(family: str, folder: Path) -> TinyLoaded:
    """A tiny model with a folder, which peft wants to look at."""
    loaded = tiny_loaded(family, folder / "base")
    loaded.config.save_pretrained(folder / "base")
    return loaded


def with_peft(model: Any, loaded: TinyLoaded) -> torch.Tensor:
    return answers(TinyLoaded(model.eval(), loaded.folder, "", loaded.family, "", loaded.config))


@pytest.mark.parametrize("family", families(*FAMILY_NAMES))
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_save(family: str, rslora: bool, tmp_path: Path) -> None:
    """Every role, fused ones included. Kills: alpha not raised with the stacked rank; rows shifted."""
    loaded = based(family, tmp_path)
    roles = tuple(role for role in roles_of(family) if family != "t5" or role not in ("embed", "head"))
    adapter = LoRA(rank=3, alpha=5, targets=roles, rslora=rslora).attach(loaded)
    base = answers(loaded)
    disturb(adapter)
    save_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    said = answers(loaded)
    assert float((said - base).abs().max()) > 0.1
    torch.testing.assert_close(with_peft(theirs, loaded), said, rtol=0, atol=1e-5)
    again = tiny_loaded(family)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answers(again), said)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / TENSORS).values()} == {torch.float32}


PEFT = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*(down|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 3, r"layers\.\d+\.mlp.*": 5},
        "alpha_pattern": {"model.layers.0.self_attn.k_proj": 7},
    },
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
    "layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.mark.parametrize("case", PEFT)
def test_what_peft_saves_loads_here_and_goes_back(case: str, tmp_path: Path) -> None:
    loaded = based("llama", tmp_path)
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, lora_alpha=12, **PEFT[case]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    said = with_peft(theirs, loaded)
    adapter = load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())
    save_adapter(adapter, tmp_path / "ours")
    again = tiny_loaded("llama", tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(answers(again), answers(loaded))
    back = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    torch.testing.assert_close(with_peft(back, loaded), said, rtol=0, atol=1e-5)


def test_an_adapter_that_peft_trained_on_a_fused_map_loads(tmp_path: Path) -> None:
    loaded = based("gpt2", tmp_path)
    theirs = peft.get_peft_model(tiny_model("gpt2"), peft.LoraConfig(r=4, target_modules=["c_attn"]))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        theirs(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(answers(loaded), with_peft(theirs, loaded), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_fresh_process_says_the_same_bits(tmp_path: Path) -> None:
    loaded = based("gpt_neox", tmp_path)
    adapter = LoRA(rank=2, targets=("q", "v", "head")).attach(loaded)
    disturb(adapter)
    save_adapter(adapter, tmp_path / "adapter")
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from tiny_models import *\nfrom tunesmith.adapt.store import load_adapter\n"
        f"loaded = tiny_loaded('gpt_neox')\nload_adapter(loaded, {str(tmp_path / 'adapter')!r})\n"
        "print(answers(loaded).numpy().tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(answers(loaded).numpy().tobytes().hex())


def saved(folder: Path, **changes: Any) -> Path:
    """A saved adapter with some settings changed."""
    adapter = LoRA(rank=2).attach(based("llama", folder))
    disturb(adapter)
    path = save_adapter(adapter, folder / "adapter")
    settings = json.loads((path / CONFIG).read_text()) | changes
    (path / CONFIG).write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen", "elsewhere"])
def test_tensors_that_do_not_fit_are_listed(fault: str, own: bool, tmp_path: Path) -> None:
    """Kills: loading what fits and skipping the rest, which answers like the base."""
    path = saved(tmp_path, **({} if own else {"tunesmith_method": None, "tunesmith_base": None}))
    tensors = load_file(path / TENSORS)
    key = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.lora_B.weight"))
    value = tensors.pop(key)
    if fault == "unexpected":
        tensors |= {key: value, key.replace("layers.1", "layers.7"): value.clone()}
    elif fault == "misshapen":
        tensors[key] = value[:-1].contiguous()
    elif fault == "elsewhere":
        tensors = {f"prefix.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, path / TENSORS)
    loaded = tiny_loaded("llama")
    before, said = bits(loaded.model), answers(loaded)
    with pytest.raises(AdapterError) as raised:
        load_adapter(loaded, path)
    told = {"misshapen": "is [31, 2] instead of [32, 2]", "elsewhere": "missing"}.get(fault, fault)
    assert told in str(raised.value)
    assert str(raised.value).count("lora_") <= 5
    assert bits(loaded.model) == before
    assert torch.equal(answers(loaded), said)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama")
    loaded.fingerprint = "0" * 64
    with pytest.raises(AdapterError, match=r"trained on another base model \(tiny-llama, fingerprint ffffffffffff"):
        load_adapter(loaded, saved(tmp_path))


UNSUPPORTED = {
    "use_dora": {"use_dora": True},
    "bias: all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "init_lora_weights: pissa": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "peft_type 'QUERY'": {"peft_type": "QUERY"},
    "r, lora_alpha": {"r": "many", "tunesmith_method": None},
    "pattern": {"rank_pattern": [3], "tunesmith_method": None},
    "tunesmith_method cannot be read": {"tunesmith_method": {"kind": "lora", "rank": 0}},
}


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_what_only_peft_has_is_refused_by_name(named: str, tmp_path: Path) -> None:
    with pytest.raises((AdapterError, ConfigError)) as raised:
        load_adapter(tiny_loaded("llama"), saved(tmp_path, **UNSUPPORTED[named]))
    assert named in str(raised.value)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(path / TENSORS)
    raw = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(raw[:-9])
    with pytest.raises(AdapterError, match=TENSORS):
        load_adapter(tiny_loaded("llama"), path)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, path / TENSORS)
    with pytest.raises(AdapterError, match="NaN or infinity in base_model"):
        load_adapter(tiny_loaded("llama"), path)
    (path / TENSORS).rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle and is never opened"):
        load_adapter(tiny_loaded("llama"), path)
    (path / CONFIG).write_text("[1, 2")
    with pytest.raises(AdapterError, match="not valid JSON"):
        load_adapter(tiny_loaded("llama"), path)
    (path / CONFIG).unlink()
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(tiny_loaded("llama"), path)


def test_a_role_cannot_reach_into_rows_of_another(tmp_path: Path) -> None:
    loaded = based("gpt2", tmp_path)
    adapter = LoRA(rank=2, targets=("q",)).attach(loaded)
    disturb(adapter)
    path = save_adapter(adapter, tmp_path / "adapter")
    tensors = load_file(path / TENSORS)
    for name, value in tensors.items():
        if "lora_B" in name:
            value[-1] = 1.0
    save_file(tensors, path / TENSORS)
    with pytest.raises(AdapterError, match="rows of another role"):
        load_adapter(tiny_loaded("gpt2"), path)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert (first / TENSORS).read_bytes() == (second / TENSORS).read_bytes()


def test_a_run_gets_an_adapter_or_a_model_by_what_was_trained(tmp_path: Path) -> None:
    loaded = based("llama", tmp_path)
    assert LoRA(rank=8).attach(loaded).save(tmp_path / "lora") == tmp_path / "lora" / "adapter"
    deep = based("llama", tmp_path)
    assert TopLayers(layers=2).attach(deep).save(tmp_path / "top") == tmp_path / "top" / "model"
    whole = based("llama", tmp_path)
    path = Full().attach(whole).save(tmp_path / "full")
    assert path == tmp_path / "full" / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = type(whole.model).from_pretrained(path)
    assert bits(plain) == bits(whole.model)
