"""Parameters that train whole beside a low-rank change: copies by route, tied and untied, in peft's files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_methods import check_method
from tiny_models import IDS, TinyLoaded, answers, bits, disturb, tiny_batch, tiny_loaded, tiny_model

from tunesmith.adapt.fpt import FPT
from tunesmith.adapt.ia3 import IA3
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE, Route
from tunesmith.plan.memory import count_parameters, tensor_specs

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def based(family: str, folder: Path, **changes: Any) -> TinyLoaded:
    loaded = tiny_loaded(family, folder / "base", **changes)
    loaded.config.save_pretrained(folder / "base")
    return loaded


def numbers(adapter: Any) -> int:
    return sum(value.numel() for value in adapter.parameters.values())


def logits(policy: Policy) -> torch.Tensor:
    batch = tiny_batch()
    with torch.no_grad():
        return policy.logits(batch, batch.sources)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert", "phi3"])
def test_every_law_of_a_method_holds_with_parameters_that_train_whole(
    family: str, tie: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The base is a route to the last bit. Kills: the copy left in place on the base's route, or not saved."""
    roles = ("embed", "norm") if family == "bert" else ("embed", "head", "norm")
    if tie and family not in ("gemma", "gpt2"):
        with pytest.raises(ConfigError, match=r"method\.tie: no weight"):
            LoRA(also_train=roles, tie=True).attach(tiny_loaded(family))
        return
    check_method(LoRA(rank=2, also_train=roles, tie=tie), family, dtype, tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_training_one_side_of_a_tied_pair_unties_it_and_the_copy_is_counted(family: str, device: str) -> None:
    """Kills: the other side trained along; a copy that no count sees; a config that goes on saying tied."""
    loaded = tiny_loaded(family)
    with torch.device(device):
        loaded.model = type(loaded.model)(loaded.config)
    embed, head = (loaded.model.get_input_embeddings, loaded.model.get_output_embeddings)
    shared, total = embed().weight, sum(value.numel() for value in loaded.model.parameters())
    assert shared is head().weight
    alone = LoRA(rank=2).attach(loaded)
    factors = numbers(alone)
    alone.detach()
    for roles, tie, trained, copies in (
        (("head",), False, 1, 1),
        (("embed",), False, 1, 1),
        (("embed", "head"), False, 2, 1),
        (("head",), True, 1, 0),
        (("embed", "head"), True, 1, 0),
    ):
        adapter = LoRA(rank=2, also_train=roles, tie=tie).attach(loaded)
        assert numbers(adapter) == factors + trained * shared.numel()
        held = sum(value.numel() for value in loaded.model.parameters())
        assert held == total + factors + copies * shared.numel()
        assert (embed().weight is shared, head().weight is shared) == (
            "embed" not in roles and not tie,
            "head" not in roles and not tie,
        )
        assert (embed().weight is head().weight) == tie == loaded.model.config.tie_word_embeddings
        adapter.detach()
        assert embed().weight is shared is head().weight
        assert loaded.model.config.tie_word_embeddings is True


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_plan_counts_the_copies_and_what_they_stand_for(family: str) -> None:
    """Both are in memory. Kills: the base's tensor forgotten while a copy is in its place."""
    loaded = tiny_loaded(family)
    with torch.device("meta"):
        loaded.model = type(loaded.model)(loaded.config)
    total = sum(value.numel() for value in loaded.model.parameters())
    adapter = LoRA(rank=2, also_train=("head", "norm")).attach(loaded)
    counted = count_parameters(tensor_specs(loaded.model, adapter.parameters.values()))
    assert (counted.total, counted.trainable) == (total + numbers(adapter), numbers(adapter))


def test_the_route_chooses_also_where_logits_are_made_in_chunks() -> None:
    """Kills: a head whose weight is read past the module that knows the route."""
    loaded = tiny_loaded("gemma")
    before = logits(Policy(loaded))
    adapter = LoRA(rank=2, also_train=("head",)).attach(loaded)
    disturb(adapter)
    batch, base, own = tiny_batch(), Policy(loaded), Policy(loaded, adapter.route)
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(before, batch.targets, reduction="none")
        torch.testing.assert_close(base.token_losses(batch), plain)
        torch.testing.assert_close(
            own.token_losses(batch),
            torch.nn.functional.cross_entropy(logits(own), batch.targets, reduction="none"),
        )
    assert torch.equal(logits(base), before)
    assert not torch.equal(logits(own), before)


@pytest.mark.parametrize("kind", ["lora", "top_layers"])
def test_adapters_with_copies_are_switched_exactly_and_never_act_together(kind: str) -> None:
    """In any order of coming and going. Kills: the copy of the last one used by all."""
    loaded = tiny_loaded("gemma")
    before, said = bits(loaded.model), {(): answers(loaded)}
    method = LoRA(rank=2, also_train=("head", "norm")) if kind == "lora" else TopLayers(layers=1)
    adapters = {}
    for seed, name in enumerate("abc"):
        adapters[name] = method.attach(loaded, name)
        disturb(adapters[name], seed)
        assert all(value.requires_grad for one in adapters.values() for value in one.parameters.values())
        with Route((name,)).enter():
            said[(name,)] = answers(loaded)
    assert len({float(value.sum()) for value in said.values()}) == 4
    for names in (("b",), (), ("c",), ("a",), ("b",)):
        with Route(names).enter():
            assert torch.equal(answers(loaded), said[names])
    with Route(("a", "b")).enter(), pytest.raises(AdapterError, match="a and b have trained copies"):
        answers(loaded)
    adapters["b"].detach()
    adapters["c"].detach()
    held = {id(value) for value in loaded.model.parameters()}
    assert {id(value) for value in adapters["a"].parameters.values()} <= held
    with Route(("a",)).enter():
        assert torch.equal(answers(loaded), said[("a",)])
    adapters["a"].detach()
    assert bits(loaded.model) == before
    assert "forward" not in loaded.model.get_output_embeddings().__dict__
    assert torch.equal(answers(loaded), said[()])


def test_gradients_are_those_of_the_route_also_when_blocks_are_computed_again() -> None:
    """Kills: a recomputation that finds the copy of another adapter."""
    batch, found = tiny_batch(), []
    for how in ("none", "full"):
        loaded = tiny_loaded("llama")
        adapter = LoRA(rank=2, also_train=("norm",)).attach(loaded, "a")
        disturb(adapter)
        disturb(LoRA(rank=2, also_train=("norm",)).attach(loaded, "b"), 1)
        Policy(loaded, adapter.route, recompute=how).token_losses(batch).sum().backward()
        found.append({name: value.grad for name, value in adapter.parameters.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("other", [LoRA(rank=2, targets=("head", "embed"), dora=True), FPT(), IA3(targets=("down",))])
def test_what_another_adapter_adds_is_added_to_the_base_not_to_a_copy(other: Any) -> None:
    """Kills: lengths, gains or products taken from whatever tensor stands in the module."""
    said = []
    for with_copies in (False, True):
        loaded = tiny_loaded("llama")
        disturb(other.attach(loaded, "other"))
        if with_copies:
            disturb(LoRA(rank=2, also_train=("head", "embed", "norm", "down")).attach(loaded, "whole"))
        with Route(("other",)).enter():
            said.append(answers(loaded))
    assert torch.equal(*said)


@pytest.mark.parametrize("other", ["head", "q"])
def test_merging_takes_the_copies_of_the_adapters_that_are_merged(other: str) -> None:
    """Kills: the copy of an adapter that is not merged left in the weights that are saved."""
    loaded = tiny_loaded("gemma")
    before = bits(loaded.model)
    disturb(LoRA(rank=2, targets=(other,)).attach(loaded, "plain"))
    disturb(LoRA(rank=2, also_train=("head", "norm")).attach(loaded, "whole"))
    for name in ("plain", "whole"):
        with Route((name,)).enter():
            acting = answers(loaded)
        merge(loaded, name)
        torch.testing.assert_close(answers(loaded), acting, rtol=0, atol=1e-5)
        assert loaded.model.config.tie_word_embeddings is (name == "plain" and other == "q")
        unmerge(loaded)
        assert loaded.model.config.tie_word_embeddings is False, "the copy stands again"
    with BASE.enter():
        assert torch.equal(answers(loaded), answers(tiny_loaded("gemma")))
    assert bits(loaded.model) != before


def test_what_cannot_train_whole_is_refused_and_leaves_the_model_alone() -> None:
    loaded = tiny_loaded("gpt2")
    before = bits(loaded.model)
    for wrong, told in (
        ({"also_train": ("k",)}, "method.also_train: k is a part of transformer.h.0.attn.c_attn"),
        ({"also_train": ("c_attn",)}, "transformer.h.0.attn.c_attn is a target, too"),
        ({"also_train": ("hat",)}, "'hat' matches nothing in gpt2"),
        ({"also_train": ("norm",), "tie": True}, "method.tie"),
    ):
        with pytest.raises(ConfigError, match=told):
            LoRA(rank=2, **wrong).attach(loaded)
    for wrong in ({"tie": True}, {"also_train": ("q",)}):
        with pytest.raises(ValidationError):
            LoRA(**wrong)
    with pytest.raises(ConfigError, match=r"method\.also_train: 'hat' matches nothing"):
        LoRA(also_train=("hat",)).check(loaded.config.to_dict())
    assert bits(loaded.model) == before


@pytest.mark.parametrize(
    ("family", "roles", "tie"),
    [
        ("llama", ("head", "norm"), False),
        ("gemma", ("head",), False),
        ("gemma", ("embed",), False),
        ("gemma", ("embed", "head"), False),
        ("gemma", ("head",), True),
        ("gpt2", ("embed", "norm"), False),
        ("bert", ("embed", "norm"), False),
        ("t5", ("norm",), False),
        ("llama", ("down", "layers.1.mlp.up_proj"), False),
    ],
)
def test_peft_loads_them_as_modules_to_save(family: str, roles: tuple[str, ...], tie: bool, tmp_path: Path) -> None:
    """Kills: a copy that is not in the file, or under a name that means other modules, too."""
    loaded = based(family, tmp_path)
    base = answers(loaded)
    adapter = LoRA(rank=2, also_train=roles, tie=tie).attach(loaded)
    disturb(adapter)
    save_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    said = answers(loaded)
    assert float((said - base).abs().max()) > 0.1
    torch.testing.assert_close(
        answers(TinyLoaded(theirs, loaded.folder, "", loaded.family, "", loaded.config)), said, rtol=0, atol=1e-5
    )
    again = tiny_loaded(family)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answers(again), said)


@pytest.mark.parametrize(
    ("family", "names", "more"),
    [
        ("llama", ["lm_head", "model.norm"], {}),
        ("llama", ["norm"], {}),
        ("gemma", ["embed_tokens"], {}),
        ("gemma", ["embed_tokens"], {"ensure_weight_tying": True}),
        ("gpt2", ["wte", "ln_f"], {}),
        ("llama", ["mlp"], {}),
    ],
)
def test_modules_to_save_of_peft_load_here_and_go_back(
    family: str, names: list[str], more: dict[str, Any], tmp_path: Path
) -> None:
    loaded = based(family, tmp_path)
    maps = ["c_attn"] if family == "gpt2" else ["q_proj"]
    config = peft.LoraConfig(r=4, target_modules=maps, modules_to_save=names, **more)
    theirs = peft.get_peft_model(tiny_model(family), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    said = answers(TinyLoaded(theirs.eval(), loaded.folder, "", loaded.family, "", loaded.config))
    adapter = load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    save_adapter(adapter, tmp_path / "ours")
    again = tiny_loaded(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(answers(again), answers(loaded))


def test_copies_of_most_of_a_model_do_not_crowd_out_the_factors(tmp_path: Path) -> None:
    """Kills: a plain model folder, which has no place for inserts."""
    loaded = based("llama", tmp_path, vocab_size=2000)
    adapter = LoRA(rank=2, also_train=("embed", "head")).attach(loaded)
    disturb(adapter)
    saved = adapter.save(tmp_path)
    assert saved.name == "adapter"
    again = tiny_loaded("llama", vocab_size=2000)
    load_adapter(again, saved)
    assert torch.equal(answers(again), answers(loaded))


def test_files_whose_parts_disagree_on_what_trains_whole_are_refused(tmp_path: Path) -> None:
    loaded = based("llama", tmp_path)
    save_adapter(LoRA(rank=2, also_train=("head",)).attach(loaded), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(settings | {"modules_to_save": None}))
    with pytest.raises(AdapterError, match="modules_to_save says otherwise"):
        load_adapter(tiny_loaded("llama"), tmp_path / "adapter")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter" / TENSORS)


def test_an_encoder_decoder_has_one_copy_for_both_sides_of_a_role() -> None:
    loaded = tiny_loaded("t5")
    adapter = LoRA(rank=2, also_train=("embed",)).attach(loaded)
    copied = [name for name in adapter.parameters if name.endswith("weight")]
    assert len(copied) == 1
    disturb(adapter)
    model = loaded.model
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.encoder.embed_tokens.weight)
    with BASE.enter():
        assert torch.equal(answers(loaded), answers(tiny_loaded("t5")))
    assert IDS.numel()
