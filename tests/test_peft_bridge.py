"""The bridge to peft: the same outputs, gradients and files as peft's own model, and the base as a route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import IDS, TinyLoaded, answers, bits, disturb, tiny_loaded, tiny_model

from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.peft_bridge import TYPES, Peft
from tunesmith.adapt.store import TENSORS, load_adapter, save_adapter
from tunesmith.core.errors import ConfigError
from tunesmith.models.families import family_of
from tunesmith.models.route import BASE, Route

PLACES = ["q_proj", "v_proj"]
# what makes a type fit maps of 32 features
SIZES: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 0, "r": 4}, "BOFT": {"boft_block_size": 4}, "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 20}, "C3A": {"block_size": 8}, "GRALORA": {"r": 4}, "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
}  # fmt: skip
# as peft begins: not the base, or the base up to rounding
OTHER_STARTS = {"FOURIERFT", "C3A", "HRA", "MISS"}


def bridged(kind: str, **more: Any) -> Peft:
    return Peft(type=kind, config={"target_modules": PLACES, **SIZES.get(kind, {}), **more})


def trained_by_peft(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("kind", TYPES)
def test_a_bridged_tuner_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    """Outputs, gradients, and the file, there and back. Kills: a frozen part that trains, a name that peft skips."""
    loaded = tiny_loaded("llama", tmp_path)
    before, said = bits(loaded.model), answers(loaded)
    adapter = bridged(kind).attach(loaded, "mine", seed=3)
    assert kind in OTHER_STARTS or torch.equal(answers(loaded), said)
    disturb(adapter)
    path = save_adapter(adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), path, is_trainable=True).eval()
    output = theirs(input_ids=IDS).logits
    torch.testing.assert_close(output, answers(loaded), rtol=0, atol=1e-5)
    output.pow(2).mean().backward()
    loaded.model(input_ids=IDS).logits.pow(2).mean().backward()
    wanted = {name: value.grad for name, value in trained_by_peft(theirs).items()}
    found = {}
    for port, _, insert in adapter.inserts():
        for name, value in insert.tuner.named_parameters():
            found[f"base_model.model.{port.path}.{name.replace('.default', '')}"] = value.grad
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    with BASE.enter():
        assert torch.equal(answers(loaded), said), "disabled is the base, bit for bit"
    now = answers(loaded)
    again = tiny_loaded("llama", tmp_path)
    load_adapter(again, path)
    assert torch.equal(answers(again), now)
    adapter.detach()
    assert bits(loaded.model) == before


def test_what_peft_saves_loads_here(tmp_path: Path) -> None:
    """Kills: settings of peft's file that are lost on the way into the method."""
    config = peft.LoHaConfig(r=3, alpha=5, target_modules="all-linear")
    theirs = peft.get_peft_model(tiny_model("llama"), config).eval()
    with torch.no_grad():
        for value in trained_by_peft(theirs).values():
            value.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = tiny_loaded("llama", tmp_path)
    adapter = load_adapter(loaded, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(answers(loaded), theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)
    save_adapter(adapter, tmp_path / "back")
    old, new = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], value) for name, value in old.items())


def test_bridged_and_own_adapters_act_together_and_apart() -> None:
    """Kills: peft's own switch of what is active; a port that hides the module from a second adapter."""
    loaded = tiny_loaded("llama")
    own, other, third = LoRA(rank=2).attach(loaded, "own"), bridged("LOHA"), bridged("LOKR")
    first, second = other.attach(loaded, "first"), third.attach(loaded, "second")
    for seed, adapter in enumerate((own, first, second)):
        disturb(adapter, seed)
    told = {}
    for names in ((), ("own",), ("first",), ("second",), ("own", "first", "second")):
        with Route(names).enter():
            told[names] = answers(loaded)
    assert len({value.numpy().tobytes() for value in told.values()}) == 5
    first.detach()
    with Route(("own",)).enter():
        assert torch.equal(answers(loaded), told[("own",)])
    with Route(("second",)).enter():
        assert torch.equal(answers(loaded), told[("second",)])


def test_a_start_depends_on_the_seed_alone() -> None:
    """Kills: initial values that depend on what was drawn before, or draws that others then miss."""
    starts = []
    for seed in (1, 1, 2):
        torch.rand(len(starts) + 1)
        state = torch.get_rng_state()
        starts.append(list(bridged("LOHA").attach(tiny_loaded("llama"), seed=seed).parameters.values()))
        assert torch.equal(torch.get_rng_state(), state)
    first, second, other = starts
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "OFT"])
def test_counts_on_the_meta_device_are_those_of_the_model(kind: str) -> None:
    loaded = tiny_loaded("llama")
    with torch.device("meta"):
        model = type(loaded.model)(loaded.config)
    bare = TinyLoaded(model, Path(), "", family_of(loaded.config), "", loaded.config)
    wanted, found = (bridged(kind).attach(one).parameters for one in (loaded, bare))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}


def test_what_cannot_be_bridged_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a traceback of peft's for a setting that is the user's."""
    loaded = tiny_loaded("llama")
    before = bits(loaded.model)
    for method, told in (
        (Peft(type="LOHAA"), "did you mean LOHA"),
        (bridged("LOHA", rank=3), "rank"),
        (bridged("LOHA", modules_to_save=["lm_head"]), "modules_to_save is not bridged"),
        (Peft(config={"target_modules": ["nowhere"]}), "nowhere"),
        (Peft(config={"target_modules": ["embed_tokens"]}), "not supported"),
    ):
        with pytest.raises(ConfigError) as raised:
            method.attach(loaded)
        assert told in str(raised.value)
    assert bits(loaded.model) == before
    monkeypatch.setattr("tunesmith.adapt.peft_bridge.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[peft\]'"):
        Peft().check({})


def test_an_error_of_peft_without_a_word_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: taking the first line of a message that has none."""

    def silent(*args: object) -> None:
        raise NotImplementedError

    monkeypatch.setitem(peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LOHA, silent)
    with pytest.raises(ConfigError, match=r"LOHA cannot be made of these settings \(NotImplementedError\)"):
        bridged("LOHA").attach(tiny_loaded("llama"))
