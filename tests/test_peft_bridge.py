"""The bridge to peft: the same outputs, gradients and files as peft's own model, and the base as a route."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conformance import check_method, check_rows, model_of
from peft_cases import NEAR_STARTS, OTHER_STARTS, bridged, cases, fresh, said_by, trained_by
from safetensors.torch import load_file
from tiny_models import IDS, TinyLoaded, answers, bits, disturb, tiny_loaded, tiny_model

from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.peft_bridge import LAYERS, OWN, REFUSED, TYPES, Peft
from tunesmith.adapt.peft_layers import whole_of
from tunesmith.adapt.store import CONFIG, TENSORS, load_adapter, save_adapter
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.families import family_of
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route

pytestmark = pytest.mark.slow

BOTH = cases("llama", "bert")
ON_LAYERS = [case for case in BOTH if case[0] in LAYERS]


def test_every_type_of_peft_is_bridged_written_here_or_refused_with_a_reason() -> None:
    """Kills: a type of the installed peft that nobody has thought of."""
    assert {kind.value for kind in peft.PEFT_TYPE_TO_TUNER_MAPPING} == {*TYPES, *OWN, *REFUSED}


@pytest.mark.parametrize(("kind", "family"), BOTH)
def test_a_bridged_tuner_is_a_method_like_any_other(kind: str, family: str, tmp_path: Path) -> None:
    """What moves, the base, reload, removal, rows. Kills: a frozen part that trains; another adapter's maps as ours."""
    method, model = bridged(kind, family), {"llama": "llama tied"}.get(family, family)
    loaded = model_of(model, tmp_path)
    said = answers(loaded)
    method.attach(loaded, seed=3)
    Policy(loaded)  # what precedes keys is seen by our attention
    if kind in NEAR_STARTS:
        torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    assert torch.equal(answers(loaded), said) == (kind not in NEAR_STARTS | OTHER_STARTS)
    check_method(method, model, torch.float32, tmp_path / "method")
    check_rows(method, model, tmp_path / "rows")
    if family == "llama":
        check_method(method, model, torch.bfloat16, tmp_path / "bf16")


@pytest.mark.parametrize(("kind", "family"), ON_LAYERS)
def test_layers_are_those_of_peft(kind: str, family: str, tmp_path: Path) -> None:
    """Outputs, gradients, and the file.

    Kills: a base that is not named; a name that peft skips; a table that stays behind as the model moves.
    """
    loaded = tiny_loaded(family, tmp_path)
    adapter = bridged(kind, family).attach(loaded, "mine", seed=3)
    disturb(adapter)
    path = save_adapter(adapter, tmp_path / "ours")
    stored = json.loads((path / CONFIG).read_text())
    assert (stored["base_model_name_or_path"], stored["inference_mode"]) == (str(tmp_path.absolute()), True)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), path, is_trainable=True).eval()
    output = said_by(theirs, kind)
    torch.testing.assert_close(output, answers(loaded), rtol=0, atol=1e-5)
    output.pow(2).mean().backward()
    mine = loaded.model(input_ids=IDS)
    (mine.logits if "logits" in mine else mine.last_hidden_state).pow(2).mean().backward()
    wanted, found = trained_by(theirs), trained_by(whole_of(adapter))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].grad, value.grad, rtol=1e-4, atol=1e-5)
    assert sorted(map(id, adapter.parameters.values())) == sorted(map(id, found.values()))
    there = {id(value) for value in (*loaded.model.parameters(), *loaded.model.buffers())}
    whole = whole_of(adapter)
    assert {id(value) for value in (*whole.parameters(), *whole.buffers())} <= there, "all of it moves with the model"


@pytest.mark.parametrize(("kind", "family"), ON_LAYERS)
def test_what_peft_saves_loads_here(kind: str, family: str, tmp_path: Path) -> None:
    """There and back. Kills: settings of peft's file that are lost on the way into the method."""
    theirs = fresh(kind, family)
    with torch.no_grad():
        for value in trained_by(theirs).values():
            value.normal_(std=0.1)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        said = said_by(theirs, kind)
    loaded = tiny_loaded(family, tmp_path)
    adapter = load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    save_adapter(adapter, tmp_path / "back")
    old, new = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], value) and new[name].dtype == value.dtype for name, value in old.items())


@pytest.mark.parametrize("kind", TYPES)
def test_counts_on_the_meta_device_are_those_of_the_model(kind: str) -> None:
    """Kills: a part that is frozen on a device and trains on another."""
    loaded = tiny_loaded("llama")
    with torch.device("meta"):
        model = type(loaded.model)(loaded.config)
    bare = TinyLoaded(model, Path(), "", family_of(loaded.config), "", loaded.config)
    wanted, found = (bridged(kind).attach(one).parameters for one in (loaded, bare))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}
    if kind in LAYERS:
        assert sum(value.numel() for value in wanted.values()) == fresh(kind).get_nb_trainable_parameters()[0]


def test_bridged_and_own_adapters_act_together_and_apart() -> None:
    """Kills: peft's own switch of what is active; a port that hides the module from a second adapter."""
    loaded = tiny_loaded("llama")
    own, other, third = LoRA(rank=2).attach(loaded, "own"), bridged("LOHA"), bridged("VERA")
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


@pytest.mark.parametrize("kind", ["OSF", "SHIRA", "GLORA", "LN_TUNING", "TRAINABLE_TOKENS", "CPT"])
def test_what_it_makes_of_the_base_is_the_base_whatever_stands_in_its_place(kind: str) -> None:
    """Kills: a layer that reads another adapter's trained copy, at the start (OSF) or in every pass (SHIRA)."""
    told = []
    for also in ((), ("q", "norm", "embed")):
        loaded = tiny_loaded("llama")
        other = LoRA(rank=2, targets=("v",), also_train=also).attach(loaded, "other")
        disturb(other)
        adapter = bridged(kind).attach(loaded, "mine")
        for value in adapter.parameters.values():
            value.data += 0.1
        with Route(("mine",)).enter():
            told.append(answers(loaded))
        with Route(("other",)).enter():
            beside = answers(loaded)
        adapter.detach()
        assert torch.equal(answers(loaded), beside)
    assert torch.equal(*told)


def test_a_factor_of_the_embedding_is_applied_once(tmp_path: Path) -> None:
    """Kills: gemma's factor on a change that has it already."""
    loaded = tiny_loaded("gemma2", tmp_path)
    adapter = bridged("TRAINABLE_TOKENS").attach(loaded)
    disturb(adapter)
    theirs = peft.PeftModel.from_pretrained(tiny_model("gemma2"), save_adapter(adapter, tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(answers(loaded), said_by(theirs, "TRAINABLE_TOKENS"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["LOHA", "VERA", "P_TUNING"])
def test_a_start_depends_on_the_seed_alone(kind: str) -> None:
    """Kills: initial values that depend on what was drawn before, or draws that others then miss."""
    starts = []
    for seed in (1, 1, 2):
        torch.rand(len(starts) + 1)
        state = torch.get_rng_state()
        starts.append(list(bridged(kind).attach(tiny_loaded("llama"), seed=seed).parameters.values()))
        assert torch.equal(torch.get_rng_state(), state)
    first, second, other = starts
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert kind == "VERA" or not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", [*OWN, *REFUSED])
def test_a_type_that_is_not_bridged_is_refused_with_its_own_reason(kind: str, tmp_path: Path) -> None:
    """Kills: one line for all of them; a traceback for a file of such a type."""
    told = OWN[kind] if kind in OWN else REFUSED[kind][0]
    with pytest.raises(ConfigError) as raised:
        Peft(type=kind).check({})
    assert kind in str(raised.value)
    assert told in str(raised.value)
    if kind in REFUSED:
        (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}')
        save_adapter(LoRA().attach(tiny_loaded("llama", tmp_path)), tmp_path / "other")
        (tmp_path / TENSORS).write_bytes((tmp_path / "other" / TENSORS).read_bytes())
        with pytest.raises(AdapterError, match=kind) as found:
            load_adapter(tiny_loaded("llama", tmp_path), tmp_path)
        assert told in str(found.value)


def test_what_cannot_be_bridged_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a traceback of peft's for a setting that is the user's."""
    loaded = tiny_loaded("llama")
    before = bits(loaded.model)
    for method, told in (
        (Peft(type="LOHAA"), "did you mean LOHA"),
        (bridged("LOHA", rank=3), "rank"),
        (bridged("LOHA", modules_to_save=["lm_head"]), "modules_to_save is not bridged"),
        (bridged("OFT", bias="all"), "bias is not bridged"),
        (bridged("POLY", n_tasks=2), "one task"),
        (bridged("MULTITASK_PROMPT_TUNING", num_tasks=2), "one task"),
        (bridged("ADALORA", target_r=4), "target_r 4 is not below init_r 4"),
        (bridged("TRAINABLE_TOKENS", token_indices=[999]), "index"),
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

    def silent(*args: Any) -> None:
        raise NotImplementedError

    monkeypatch.setitem(peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LOHA, silent)
    with pytest.raises(ConfigError, match=r"LOHA cannot be made of these settings \(NotImplementedError\)"):
        bridged("LOHA").attach(tiny_loaded("llama"))
