"""PiSSA: peft's outputs and gradients over an untouched base, and files that are plain LoRA of twice the rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from test_methods import check_method
from tiny_models import IDS, TinyLoaded, answers, bits, disturb, roles_of, tiny_loaded, tiny_model

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.models.maps import base_matrix
from tunesmith.models.ports import ports

pytestmark = pytest.mark.filterwarnings("ignore")
MAPS = {"gpt2": ("c_attn",), "llama": ("q_proj", "down_proj"), "bert": ("query", "value")}


def pushed(adapter: Adapter) -> None:
    """Away from the start by a little."""
    at = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    disturb(adapter)
    with torch.no_grad():
        for name, value in adapter.parameters.items():
            value.add_(at[name])


def based(family: str, folder: Path, **changes: Any) -> TinyLoaded:
    loaded = tiny_loaded(family, folder / "base", **changes)
    loaded.config.save_pretrained(folder / "base")
    return loaded


def said_by(model: Any) -> torch.Tensor:
    output = model(input_ids=IDS)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox", "phi3", "bert"])
def test_every_law_of_a_method_holds(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Step 0 is the base to the bit. Kills: B A - B0 A0 as the difference of two products."""
    check_method(LoRA(rank=2, targets=roles_of(family), init="pissa"), family, dtype, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_factors_start_at_the_best_approximation_of_their_rank(family: str) -> None:
    """Of the rows of the role alone. Kills: factors that are not scaled; W of all roles decomposed at once."""
    loaded = tiny_loaded(family)
    LoRA(rank=4, alpha=6.0, targets=("q", "v"), init="pissa").attach(loaded)
    for port in ports(loaded.model):
        for insert in port.inserts["default"].values():
            weight = base_matrix(port, insert.rows).double()
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
            best = left[:, :4] * sizes[:4] @ right[:4]
            made = insert.scale * insert["B"].detach().double() @ insert["A"].detach().double()
            torch.testing.assert_close(made, best, rtol=0, atol=2e-6)
            balance = insert["A"].norm(dim=1), insert["B"].norm(dim=0)
            torch.testing.assert_close(*balance, rtol=1e-4, atol=1e-5)


def test_the_start_is_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a resumed run on other threads that subtracts another start than it began with."""
    found, used, plain = [], [], torch.linalg.svd

    def watched(*args: Any, **kwargs: Any) -> Any:
        used.append(torch.get_num_threads())
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            adapter = LoRA(rank=4, init="pissa").attach(tiny_loaded("llama"), seed=threads)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        found.append({name: value.detach().clone() for name, value in adapter.parameters.items()})
    assert set(used) == {1}
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", MAPS)
def test_outputs_and_gradients_are_those_of_peft(family: str, dropout: float) -> None:
    """Over five steps of training. Kills: a gradient through B0 A0; dropout on what peft keeps in the base."""
    loaded = tiny_loaded(family)
    targets = MAPS[family] if not dropout else MAPS[family][-1:]
    adapter = LoRA(rank=3, alpha=5, targets=targets, init="pissa", dropout=dropout).attach(loaded)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(targets), init_lora_weights="pissa", lora_dropout=dropout
    )
    theirs = peft.get_peft_model(tiny_model(family), config)
    own = adapter.parameters
    twins = {
        name: next(p for key, p in theirs.named_parameters() if f"{port.path}.lora_{part}." in key)
        for port, role, _ in adapter.inserts()
        for part in "AB"
        for name in [f"{port.path}.{role}.{part}"]
    }
    # singular vectors come with either sign
    signs = {name: torch.sign((own[name] * twin).sum(1 if name.endswith("A") else 0)) for name, twin in twins.items()}
    optimizers = [torch.optim.SGD(held, lr=0.05) for held in (own.values(), twins.values())]
    for step in range(5):
        outputs = []
        for model, optimizer in zip((loaded.model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()
            torch.manual_seed(step)
            outputs.append(said_by(model))
            outputs[-1].pow(2).mean().backward()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
        for name, twin in twins.items():
            sign = signs[name][:, None] if name.endswith("A") else signs[name]
            assert own[name].grad is not None
            torch.testing.assert_close(own[name].grad, twin.grad * sign, rtol=0, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma"])
def test_files_are_plain_lora_of_twice_the_rank_and_training_goes_on_from_them(family: str, tmp_path: Path) -> None:
    """Kills: B0 with the wrong sign; alpha of the half rank; a start that is computed anew from factors that moved."""
    loaded = based(family, tmp_path)
    base = answers(loaded)
    targets = ("q", "v", "embed")
    adapter = LoRA(rank=3, alpha=5, targets=targets, ranks={"v": 2}, init="pissa").attach(loaded)
    pushed(adapter)
    save_adapter(adapter, tmp_path / "adapter")
    said = answers(loaded)
    assert float((said - base).abs().max()) > 0.1
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(said_by(theirs), said, rtol=0, atol=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True
    again = tiny_loaded(family)
    back = load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answers(again), said)
    for one, other in zip(adapter.inserts(), back.inserts(), strict=True):
        assert all(torch.equal(getattr(one[2], name), getattr(other[2], name)) for name in ("A", "B", "A0", "B0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_fresh_start_changes_no_bit(dtype: torch.dtype) -> None:
    loaded = tiny_loaded("gpt2", dtype=dtype)
    before = bits(loaded.model)
    adapter = LoRA(rank=4, init="pissa", targets=("q", "up")).attach(loaded)
    merge(loaded, adapter.name)
    assert bits(loaded.model) == before
    unmerge(loaded)
    pushed(adapter)
    acting = answers(loaded).float()
    merge(loaded, adapter.name)
    assert float((answers(loaded).float() - acting).norm() / acting.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_in_bfloat16_a_small_change_is_not_lost_between_large_products() -> None:
    """Kills: s B A x - s B0 A0 x, whose rounding is that of the largest part of W x."""
    loaded, exact = tiny_loaded("llama", dtype=torch.bfloat16), tiny_loaded("llama", dtype=torch.float32)
    for one in (loaded, exact):
        adapter = LoRA(rank=8, targets=("up",), init="pissa").attach(one)
        with torch.no_grad():
            for name, value in adapter.parameters.items():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))), alpha=1e-3)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for (port, _, insert), (_, _, wanted) in zip(ports_of(loaded), ports_of(exact), strict=True):
        said = insert.method.delta(insert, x, port.base(x)).float()
        true = x.float() @ wanted.method.weight(wanted).T
        assert float((said - true).norm() / true.norm()) < 0.05


def ports_of(loaded: TinyLoaded) -> list[Any]:
    return [(port, role, insert) for port in ports(loaded.model) for role, insert in port.inserts["default"].items()]


def test_it_is_planned_without_weights_and_not_together_with_dora() -> None:
    loaded = tiny_loaded("gpt2")
    with torch.device("meta"):
        loaded.model = type(loaded.model)(loaded.config)
    plain = sum(p.numel() for p in LoRA(rank=2).attach(loaded, "a").parameters.values())
    assert sum(p.numel() for p in LoRA(rank=2, init="pissa").attach(loaded, "b").parameters.values()) == plain
    with pytest.raises(ValidationError, match="choose one"):
        LoRA(dora=True, init="pissa")
