"""Prompts and layer prefixes in peft's files: the same answers and gradients on both sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TinyLoaded, disturb, tiny_batch, tiny_loaded, tiny_model
from torch import Tensor

from tunesmith.adapt.method import Method
from tunesmith.adapt.prefix_layer import PrefixLayer
from tunesmith.adapt.prompt import Prompt
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.core.errors import AdapterError
from tunesmith.models.inserts import Keys
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route

DOCUMENT = tiny_batch((9,))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FAMILIES = ["llama", "gpt2", "gemma", "qwen3", "phi3", "gpt_neox", "opt"]
pytestmark = pytest.mark.filterwarnings("ignore")


def based(family: str, folder: Path) -> TinyLoaded:
    loaded = tiny_loaded(family, folder / "base")
    loaded.config.save_pretrained(folder / "base")
    return loaded


def ours(loaded: Any) -> Tensor:
    route = Route(("default",))
    return Policy(loaded, route).logits(DOCUMENT, torch.arange(9))


def theirs(model: Any) -> Tensor:
    """Logits of the document's own tokens; peft gives those of a prompt, too."""
    logits: Tensor = model.eval()(input_ids=DOCUMENT.ids[None]).logits[0, -9:]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", [Prompt(length=4), PrefixLayer(length=3), PrefixLayer(length=3, reparameterise=True)], ids=str
)
def test_peft_loads_what_we_save(method: Method, family: str, tmp_path: Path) -> None:
    """Kills: values before keys; blocks in another order; heads of the queries counted for those of the keys."""
    loaded = based(family, tmp_path)
    adapter = method.attach(loaded)  # type: ignore[arg-type]
    disturb(adapter, size=0.3)
    save_adapter(adapter, tmp_path / "adapter")
    said = ours(loaded)
    back = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    torch.testing.assert_close(theirs(back), said, rtol=0, atol=1e-5)
    again = tiny_loaded(family)
    load_adapter(again, tmp_path / "adapter")  # type: ignore[arg-type]
    assert torch.equal(ours(again), said)
    assert [*load_file(tmp_path / "adapter" / TENSORS)] == ["prompt_embeddings"]
    save_adapter(load_adapter(tiny_loaded(family), tmp_path / "adapter"), tmp_path / "twice")  # type: ignore[arg-type]
    assert (tmp_path / "twice" / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()


THEIRS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "projected": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24
    ),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_saves_loads_here_with_its_outputs_and_gradients(kind: str, family: str, tmp_path: Path) -> None:
    loaded = based(family, tmp_path)
    other = peft.get_peft_model(tiny_model(family), replace(THEIRS[kind]))
    other.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(loaded, tmp_path / "theirs")  # type: ignore[arg-type]
    said, wanted = ours(loaded), theirs(other)
    torch.testing.assert_close(said, wanted, rtol=0, atol=1e-5)
    save_adapter(adapter, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    torch.testing.assert_close(theirs(back), wanted, rtol=0, atol=1e-5)
    back.prompt_encoder.default.embedding.weight.requires_grad_(True)
    theirs(back).square().sum().backward()
    said.square().sum().backward()
    gradient = torch.cat([p.grad for _, _, insert in adapter.inserts() for p in insert.parameters()], 1)  # type: ignore[misc]
    expected = back.prompt_encoder.default.embedding.weight.grad
    if kind != "prompt" and family == "gpt2":  # one map holds keys and values, in this order
        assert [role for _, role, insert in adapter.inserts() if isinstance(insert, Keys)] == ["k", "v"] * 2
    assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm())


def test_a_prompt_of_an_encoder_decoder_goes_to_peft_and_back(tmp_path: Path) -> None:
    loaded = based("t5", tmp_path)
    adapter = Prompt(length=4).attach(loaded)  # type: ignore[arg-type]
    disturb(adapter, size=0.5)
    save_adapter(adapter, tmp_path / "adapter")
    losses = Policy(loaded, adapter.route).token_losses(DOCUMENT)  # type: ignore[arg-type]
    back = peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path / "adapter").eval()
    heard, given = torch.cat([DOCUMENT.ids[:2], torch.tensor([2])]), DOCUMENT.ids[2:]
    heard[-1] = loaded.config.eos_token_id
    mean = back(input_ids=heard[None], labels=given[None], attention_mask=torch.ones(1, 3)).loss
    torch.testing.assert_close(losses.mean(), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_transformer_submodules": 2}, "vectors for the decoder, too"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"num_virtual_tokens": 5}, r"prompt_embeddings is \[4, 32\] instead of \[5, 32\]"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
        ({"peft_type": "PREFIX_TUNING"}, r"instead of \[4, 64\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    loaded = based("llama", tmp_path)
    adapter = Prompt(length=4).attach(loaded)  # type: ignore[arg-type]
    path = save_adapter(adapter, tmp_path / "adapter")
    adapter.detach()
    settings = json.loads((path / CONFIG).read_text()) | changes
    (path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=says):
        load_adapter(loaded, path)  # type: ignore[arg-type]
    assert loaded.model.__dict__["_tunesmith_attached"].names == []


def test_a_prefix_of_another_family_is_refused(tmp_path: Path) -> None:
    loaded = based("llama", tmp_path)
    path = save_adapter(PrefixLayer(length=2).attach(loaded), tmp_path / "adapter")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="t5 attends in a way of its own"):
        load_adapter(tiny_loaded("t5"), path)  # type: ignore[arg-type]
