"""LoRA and peft's LoRA: the same outputs and gradients, in training, dropout drawn alike."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny_models import IDS, disturb, tiny_loaded, tiny_model

from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.store import save_adapter
from tunesmith.models.inserts import gathered

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {"gpt2": ("q", "v", "up"), "llama": ("q", "v", "down"), "bert": ("k", "o", "up")}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_outputs_and_gradients_are_those_of_peft(family: str, rslora: bool, dropout: float, tmp_path: Path) -> None:
    """Kills: a scale on one factor's gradient alone; dropout after A; rows of a fused map taken for others."""
    loaded = tiny_loaded(family, tmp_path / "base")
    loaded.config.save_pretrained(tmp_path / "base")
    # one draw a map: roles that share one would draw twice
    targets = ("o",) if (family, dropout > 0) == ("gpt2", True) else TARGETS[family]
    adapter = LoRA(rank=3, alpha=5, targets=targets, rslora=rslora, dropout=dropout).attach(loaded)
    disturb(adapter)
    save_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter", is_trainable=True)
    found = []
    for model in (loaded.model, theirs):
        model.train()
        torch.manual_seed(3)
        output = model(input_ids=IDS)
        found.append(output.logits if "logits" in output else output.last_hidden_state)
        found[-1].pow(2).mean().backward()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * len({port.path for port, _, _ in adapter.inserts()})
    for port, role, insert in adapter.inserts():
        at = list(port.inserts["default"]).index(role) * 3
        down = next(g for key, g in grads.items() if f"{port.path}.lora_A." in key)[at : at + 3]
        up = next(g for key, g in grads.items() if f"{port.path}.lora_B." in key)[:, at : at + 3]
        up = up if insert.rows is None else gathered(up.T, insert.rows).T
        torch.testing.assert_close(insert["A"].grad, down, rtol=0, atol=1e-5)
        torch.testing.assert_close(insert["B"].grad, up, rtol=0, atol=1e-5)
        assert float(down.abs().max()) > 1e-4
