"""IA3 against peft: the same outputs, gradients and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IDS, answers, bits, disturb, tiny_loaded, tiny_model

from tunesmith.adapt.ia3 import IA3
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.store import TENSORS, load_adapter, save_adapter
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.inserts import gathered
from tunesmith.models.route import BASE

_BERT_DOWN = ["0.output.dense", "1.output.dense"]
# family to our targets, peft's, and peft's feed-forward ones
SAME: dict[str, tuple[tuple[str, ...], list[str], list[str]]] = {
    "llama": (("k", "v", "down"), ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (("q", "k", "v", "down"), ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (("k", "v", "down"), ["key", "value", *_BERT_DOWN], _BERT_DOWN),
    "t5": (("k", "v", "down"), ["k", "v", "wo"], ["wo"]),
}


def said_by(model: Any, family: str) -> torch.Tensor:
    """What a model of peft says of the same tokens."""
    more = {"decoder_input_ids": IDS} if family == "t5" else {}
    output = model(input_ids=IDS, **more)
    return output.logits if "logits" in output else output.last_hidden_state


def factors(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name.partition(".ia3_l")[0]: value for name, value in model.named_parameters() if "ia3_l" in name}


@pytest.mark.parametrize("family", SAME)
def test_outputs_gradients_and_files_are_those_of_peft(family: str, tmp_path: Path) -> None:
    """Kills: a factor on the wrong side of down, one that leaves the bias out, a vector saved for the wrong rows."""
    ours, targets, inner = SAME[family]
    loaded = tiny_loaded(family, tmp_path)
    adapter = IA3(targets=ours).attach(loaded)
    disturb(adapter)
    with torch.no_grad():
        for value in adapter.parameters.values():
            value += 1
    save_adapter(adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(said_by(theirs, family), answers(loaded), rtol=0, atol=1e-5)
    said_by(theirs, family).pow(2).mean().backward()
    said_by(loaded.model, family).pow(2).mean().backward()
    wanted = {name: value.grad.flatten() for name, value in factors(theirs).items()}
    for port, _, insert in adapter.inserts():
        whole = wanted[f"base_model.model.{port.path}"]
        [own] = insert.parameters()
        torch.testing.assert_close(
            own.grad, whole if insert.rows is None else gathered(whole, insert.rows), rtol=1e-5, atol=1e-5
        )

    config = peft.IA3Config(target_modules=targets, feedforward_modules=inner, fan_in_fan_out=family == "gpt2")
    other = peft.get_peft_model(tiny_model(family), config)
    with torch.no_grad():
        for value in factors(other).values():
            value += 0.2 * torch.rand_like(value)
    other.save_pretrained(tmp_path / "theirs")
    again = tiny_loaded(family, tmp_path)
    read = load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(answers(again), said_by(other, family), rtol=0, atol=1e-5)
    save_adapter(read, tmp_path / "back")
    assert load_file(tmp_path / "back" / TENSORS).keys() == load_file(tmp_path / "theirs" / TENSORS).keys()
    for name, value in load_file(tmp_path / "theirs" / TENSORS).items():
        assert torch.equal(load_file(tmp_path / "back" / TENSORS)[name], value)


def test_peft_may_scale_any_map_where_it_reads(tmp_path: Path) -> None:
    """Kills: a side that is taken from the role rather than from the file."""
    config = peft.IA3Config(target_modules=["dense", "query"], feedforward_modules=["dense"])
    theirs = peft.get_peft_model(tiny_model("bert"), config)
    with torch.no_grad():
        for value in factors(theirs).values():
            value += 0.2 * torch.rand_like(value)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = tiny_loaded("bert", tmp_path)
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(answers(loaded), said_by(theirs, "bert"), rtol=0, atol=1e-5)


def test_merged_is_unmerged_where_outputs_have_no_bias() -> None:
    """Kills: columns scaled for rows."""
    loaded = tiny_loaded("llama")
    before = bits(loaded.model)
    adapter = IA3().attach(loaded)
    disturb(adapter, size=0.3)
    said = answers(loaded)
    merge(loaded, "default")
    torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    unmerge(loaded)
    assert bits(loaded.model) == before
    inner = tiny_loaded("gpt2")
    adapter = IA3(targets=("down",)).attach(inner)
    disturb(adapter, size=0.3)
    said = answers(inner)
    merge(inner, "default")
    torch.testing.assert_close(answers(inner), said, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bert"])
def test_a_scaled_bias_is_merged_with_its_weight(family: str) -> None:
    """Kills: a merge that scales the weight and leaves the bias behind, or the bias of other rows."""
    loaded = tiny_loaded(family)
    before = bits(loaded.model)
    disturb(IA3(targets=("k", "o")).attach(loaded), size=0.3)
    said = answers(loaded)
    merge(loaded, "default")
    torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    unmerge(loaded)
    assert bits(loaded.model) == before
    assert torch.equal(answers(loaded), said)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Kills: a vector for other rows that is dropped; a target that is no linear map."""
    for name in ("norm", "embed"):
        with pytest.raises(ConfigError, match=f"{name} is no linear map"):
            IA3(targets=("k", name)).attach(tiny_loaded("llama"))
    adapter = IA3(targets=("k",)).attach(tiny_loaded("gpt2", tmp_path))
    path = save_adapter(adapter, tmp_path / "adapter")
    tensors = load_file(path / TENSORS)
    for value in tensors.values():
        value[0] = 2.0  # a row of q
    save_file(tensors, path / TENSORS)
    loaded = tiny_loaded("gpt2")
    before = bits(loaded.model)
    with pytest.raises(AdapterError, match="rows of another role"):
        load_adapter(loaded, path)
    assert bits(loaded.model) == before
    tensors.popitem()
    save_file(tensors, path / TENSORS)
    with pytest.raises(AdapterError, match="missing base_model"):
        load_adapter(loaded, path)


def test_the_base_is_a_route() -> None:
    loaded = tiny_loaded("llama")
    said = answers(loaded)
    disturb(IA3().attach(loaded))
    with BASE.enter():
        assert torch.equal(answers(loaded), said)
