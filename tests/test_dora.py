"""DoRA: the paper's formula, peft's outputs and gradients, identity to the bit, merging, files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from test_methods import check_method
from tiny_models import IDS, TinyLoaded, answers, bits, disturb, families, roles_of, tiny_loaded, tiny_model

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.models.inserts import gathered
from tunesmith.models.ports import ports
from tunesmith.models.route import BASE, Route

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = {"gpt2": ("q", "v", "o"), "llama": ("q", "v", "down"), "bert": ("q", "v", "up")}


def with_peft(model: Any, loaded: TinyLoaded) -> torch.Tensor:
    return answers(TinyLoaded(model.eval(), loaded.folder, "", loaded.family, "", loaded.config))


def based(family: str, folder: Path, **changes: Any) -> TinyLoaded:
    loaded = tiny_loaded(family, folder / "base", **changes)
    loaded.config.save_pretrained(folder / "base")
    return loaded


def moved(adapter: Adapter) -> None:
    """Factors with something to say, lengths near those of the base."""
    lengths = {name: value.detach().clone() for name, value in adapter.parameters.items() if name.endswith(".m")}
    disturb(adapter)
    with torch.no_grad():
        for name, value in lengths.items():
            adapter.parameters[name].copy_(value * (1 + adapter.parameters[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families("llama", "gemma", "gpt2", "gpt_neox", "phi3", "bert", "t5"))
def test_every_law_of_a_method_holds(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Step 0 is the base to the bit, in bfloat16, too. Kills: lengths rounded before they are divided."""
    roles = tuple(role for role in roles_of(family) if family != "t5" or role not in ("embed", "head"))
    if family == "t5":
        loaded = tiny_loaded(family, dtype=dtype)
        said = answers(loaded)
        LoRA(rank=2, targets=roles, dora=True).attach(loaded)
        assert torch.equal(answers(loaded), said)
        return
    check_method(LoRA(rank=2, targets=roles, dora=True), family, dtype, tmp_path)


@pytest.mark.parametrize("family", families("llama", "gpt2", "gpt_neox", "phi3"))
def test_a_port_computes_the_formula_of_the_paper(family: str) -> None:
    """m V / |V| in float64, at the rows of each role. Kills: lengths of columns, of all rows of a fused map, of W."""
    loaded = tiny_loaded(family)
    moved(LoRA(rank=4, alpha=6.0, targets=("q", "v", "down"), dora=True).attach(loaded))
    for port in ports(loaded.model):
        flipped = type(port.base) is not torch.nn.Linear
        held = port.base.weight.detach().double().T if flipped else port.base.weight.detach().double()
        x = torch.randn(3, held.shape[1])
        with torch.no_grad():
            change = (port(x) - port.base(x)).double()
        for insert in port.inserts["default"].values():
            a, b, m = (insert[name].detach().double().numpy() for name in "ABm")
            mine = held if insert.rows is None else gathered(held.T, insert.rows).T
            v = mine.numpy() + 6 / 4 * b @ a
            wanted = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - mine.numpy()
            part = change if insert.rows is None else gathered(change, insert.rows)
            np.testing.assert_allclose(part.numpy(), x.double().numpy() @ wanted.T, rtol=0, atol=5e-6)
            np.testing.assert_allclose(insert.method.weight(insert).numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", families(*FAMILIES))
def test_outputs_and_gradients_are_those_of_peft(family: str, dropout: float, tmp_path: Path) -> None:
    """From one file, in training. Kills: a gradient through the lengths; dropout on one part of the formula only."""
    targets = FAMILIES[family] if not dropout else {"gpt2": ("o",), "llama": ("q", "down"), "bert": ("up",)}[family]
    loaded = based(family, tmp_path)
    adapter = LoRA(rank=3, alpha=5, targets=targets, dora=True, dropout=dropout).attach(loaded)
    moved(adapter)
    save_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter", is_trainable=True)
    found = []
    for model in (loaded.model, theirs):
        model.train()
        torch.manual_seed(3)
        output = model(input_ids=IDS)
        (output.logits if "logits" in output else output.last_hidden_state).pow(2).mean().backward()
        found.append(output[0].detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for port, role, insert in adapter.inserts():
        for name, part in {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}.items():
            wanted = next(g for key, g in grads.items() if f"{port.path}.{part}." in key)
            if len(port.inserts["default"]) > 1 and name in "AB":
                at = list(port.inserts["default"]).index(role) * 3
                wanted = wanted[at : at + 3] if name == "A" else wanted[:, at : at + 3]
            if insert.rows is not None and name in "Bm":
                wanted = gathered(wanted.T, insert.rows).T if name == "B" else gathered(wanted, insert.rows)
            torch.testing.assert_close(insert[name].grad, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", families(*FAMILIES, "gemma"))
def test_files_go_both_ways(family: str, tmp_path: Path) -> None:
    """Kills: lengths of other roles' rows lost; an embedding's lengths by token instead of by feature."""
    loaded = based(family, tmp_path)
    base = answers(loaded)
    targets = (*FAMILIES.get(family, ("q", "v")), "embed")
    adapter = LoRA(rank=3, targets=targets, dora=True).attach(loaded)
    moved(adapter)
    save_adapter(adapter, tmp_path / "ours")
    said = answers(loaded)
    assert float((said - base).abs().max()) > 0.1
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    torch.testing.assert_close(with_peft(theirs, loaded), said, rtol=0, atol=1e-5)
    again = tiny_loaded(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(answers(again), said)
    names = ["c_attn"] if family == "gpt2" else ["query"] if family == "bert" else ["q_proj", "v_proj"]
    made = peft.get_peft_model(
        tiny_model(family), peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=names)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    made.save_pretrained(tmp_path / "theirs")
    fresh = tiny_loaded(family)
    load_adapter(fresh, tmp_path / "theirs")
    torch.testing.assert_close(answers(fresh), with_peft(made, loaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families("llama", "gpt2", "gemma"))
def test_merged_is_unmerged_also_beside_another_adapter(family: str, dtype: torch.dtype) -> None:
    """The sum of two is the sum of their changes. Kills: lengths that scale what another adapter has added."""
    loaded = tiny_loaded(family, dtype=dtype)
    before = bits(loaded.model)
    moved(LoRA(rank=2, targets=("q", "v", "embed"), dora=True).attach(loaded, "a"))
    disturb(LoRA(rank=2, targets=("q", "v")).attach(loaded, "b"), size=0.05)
    for names in (("a",), ("b", "a"), ("a", "b")):
        with Route(names).enter():
            acting = answers(loaded).float()
        merge(loaded, names)
        merged = answers(loaded).float()
        unmerge(loaded)
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        assert float((merged - acting).norm() / acting.norm()) < bound
    assert bits(loaded.model) == before
    with BASE.enter():
        assert torch.equal(answers(loaded), answers(tiny_loaded(family, dtype=dtype)))


def test_a_small_change_of_lengths_acts_in_bfloat16() -> None:
    """Kills: the share rounded before one is taken away, which bfloat16 makes nothing or four times as much."""
    loaded = tiny_loaded("llama", dtype=torch.bfloat16)
    adapter = LoRA(rank=2, targets=("up",), dora=True).attach(loaded)
    port, _, insert = adapter.inserts()[0]
    with torch.no_grad():
        insert["m"].mul_(1.001)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        y = port.base(x)
        torch.testing.assert_close(insert.method.delta(insert, x, y).float(), 0.001 * y.float(), rtol=0.02, atol=1e-5)


def test_a_row_of_zeros_does_no_harm() -> None:
    loaded = tiny_loaded("llama")
    loaded.model.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    said = answers(loaded)
    adapter = LoRA(rank=2, dora=True).attach(loaded)
    assert torch.equal(answers(loaded), said)
    loaded.model(IDS).logits.pow(2).mean().backward()
    assert all(bool(torch.isfinite(value.grad).all()) for value in adapter.parameters.values())


def test_lengths_are_counted_without_weights() -> None:
    """Kills: lengths taken from data when there is none."""
    loaded = tiny_loaded("gpt2")
    with torch.device("meta"):
        loaded.model = type(loaded.model)(loaded.config)
    plain = sum(p.numel() for p in LoRA(rank=2).attach(loaded, "a").parameters.values())
    assert sum(p.numel() for p in LoRA(rank=2, dora=True).attach(loaded, "b").parameters.values()) == plain + 2 * 64
