"""Merging: the same answers, the very same bytes afterwards, in every dtype, tied or not."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILY_NAMES, IDS, answers, bits, disturb, families, roles_of, tiny_loaded
from transformers import AutoModelForCausalLM

from tunesmith.adapt.bitfit import BitFit
from tunesmith.adapt.ia3 import IA3
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.method import Method
from tunesmith.core.errors import AdapterError
from tunesmith.models.route import BASE, Route
from tunesmith.models.save import write_model


@pytest.mark.parametrize("family", families(*FAMILY_NAMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_unmerged_and_unmerging_restores_every_byte(family: str, dtype: torch.dtype) -> None:
    """Kills: subtracting to unmerge; merging in the base's dtype twice over; rows of fused maps ignored."""
    loaded = tiny_loaded(family, dtype=dtype)
    before = bits(loaded.model)
    roles = tuple(role for role in roles_of(family) if family != "t5" or role != "embed")
    adapter = LoRA(rank=2, targets=roles).attach(loaded)
    disturb(adapter, size=0.05)
    acting = answers(loaded).float()
    merge(loaded, adapter.name)
    with adapter.route.enter():
        merged = answers(loaded).float()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert float((merged - acting).norm() / acting.norm()) < bound
    assert bits(loaded.model) != before
    unmerge(loaded)
    assert bits(loaded.model) == before
    assert torch.equal(answers(loaded).float(), acting)


def test_the_change_is_rounded_once() -> None:
    """The sum of two adapters in float32, then bfloat16. Kills: rounding after each."""
    loaded = tiny_loaded("llama", dtype=torch.bfloat16)
    first, second = LoRA(rank=2, targets=("q",)).attach(loaded, "a"), LoRA(rank=2, targets=("q",)).attach(loaded, "b")
    disturb(first, 1)
    disturb(second, 2)
    port, _, one = first.inserts()[0]
    two = second.inserts()[0][2]
    wanted = (port.weight.float() + one.method.weight(one) + two.method.weight(two)).bfloat16()
    merge(loaded, ("a", "b"))
    assert torch.equal(port.weight, wanted)
    assert port.weight is port.base.weight


def test_a_merged_map_costs_what_the_base_costs() -> None:
    """Kills: asking for the route at every map of a merged model; maps that stay deaf after unmerging."""
    loaded = tiny_loaded("llama")
    adapter = LoRA(rank=2, targets=("q", "down")).attach(loaded)
    disturb(adapter, size=0.05)
    acting = answers(loaded)
    merge(loaded, adapter.name)
    first, *others = [port for port, _, _ in adapter.inserts()]
    assert others
    assert all(port.forward == port.base.forward for port in others)
    assert first.forward != first.base.forward, "one asks for all, so that a wrong route is an error"
    unmerge(loaded)
    assert torch.equal(answers(loaded), acting)


@pytest.mark.slow
def test_a_thousand_switches_between_eight_adapters_leave_the_base_bit_identical() -> None:
    """By merging and by routing, in bfloat16. Kills: any arithmetic on the way back."""
    loaded = tiny_loaded("gemma", dtype=torch.bfloat16)
    before = bits(loaded.model)
    names = [f"task{index}" for index in range(8)]
    for index, name in enumerate(names):
        disturb(LoRA(rank=2, targets=("q", "v", "embed")).attach(loaded, name), index)
    said = {}
    for name in names:
        with Route((name,)).enter():
            said[name] = answers(loaded)
    assert len({value.float().sum().item() for value in said.values()}) == 8
    for turn in range(1000):
        name = names[turn * 5 % 8]
        merge(loaded, name)
        if turn % 100 == 0:
            assert bits(loaded.model) != before
            with Route((name,)).enter():
                torch.testing.assert_close(answers(loaded), said[name], rtol=0.1, atol=0.3)
        unmerge(loaded)
    assert bits(loaded.model) == before
    for name in names:
        with Route((name,)).enter():
            assert torch.equal(answers(loaded), said[name])


def test_merging_twice_and_other_routes_are_errors() -> None:
    loaded = tiny_loaded("llama")
    adapter = LoRA(rank=2).attach(loaded, "a")
    LoRA(rank=2).attach(loaded, "b")
    with pytest.raises(AdapterError, match="nothing is merged"):
        unmerge(loaded)
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        merge(loaded, "c")
    merge(loaded, "a")
    with pytest.raises(AdapterError, match="a is merged already"):
        merge(loaded, "b")
    for route in (BASE, Route(("b",))):
        with route.enter(), pytest.raises(AdapterError, match="unmerge first"):
            answers(loaded)
    for refused in (adapter.detach, lambda: LoRA().attach(loaded, "c")):
        with pytest.raises(AdapterError, match="unmerge first"):
            refused()
    unmerge(loaded)
    adapter.detach()


@pytest.mark.parametrize("side", ["embed", "head"])
@pytest.mark.parametrize("family", families("gemma", "gpt2"))
def test_merging_one_side_of_a_tied_pair_unties_it(family: str, side: str, tmp_path: Path) -> None:
    """And what is saved then loads in plain transformers. Kills: the other side changed; a config that says tied."""
    loaded = tiny_loaded(family)
    embed, head = loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight
    assert embed is head
    adapter = LoRA(rank=2, targets=(side, "q")).attach(loaded)
    disturb(adapter)
    acting = answers(loaded)
    merge(loaded, adapter.name)
    still = "get_output_embeddings" if side == "embed" else "get_input_embeddings"
    assert getattr(loaded.model, still)().weight is embed
    assert loaded.model.config.tie_word_embeddings is False
    write_model(loaded, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.arange(3, 14)[None]).logits, acting, rtol=0, atol=1e-5)
    unmerge(loaded)
    assert loaded.model.config.tie_word_embeddings is True
    assert loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight is embed


@pytest.mark.parametrize("method", [BitFit(), IA3(targets=("attn", "mlp"))], ids=lambda method: method.kind)
@pytest.mark.parametrize(
    "family", families("llama", "smollm3", "granite", "qwen2", "gpt2", "gpt_neox", "bert", "deberta-v2")
)
def test_biases_merge_and_plain_transformers_reads_them(family: str, method: Method, tmp_path: Path) -> None:
    """llama, smollm3 and granite have none until their config says so. Kills: a bias that is left behind, or saved for
    a config that makes none; a switch that stays on."""
    loaded = tiny_loaded(family)
    before, base = bits(loaded.model), answers(loaded)
    switches = {name: getattr(loaded.config, name, None) for name in ("attention_bias", "mlp_bias")}
    disturb(method.attach(loaded), size=0.3)
    acting = answers(loaded)
    assert float((acting - base).abs().max()) > 0.1
    merge(loaded, "default")
    torch.testing.assert_close(answers(loaded), acting, rtol=0, atol=1e-5)
    write_model(loaded, tmp_path)
    plain, told = type(loaded.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        said = plain.eval()(input_ids=IDS)[0]
    torch.testing.assert_close(said, acting, rtol=0, atol=1e-5)
    unmerge(loaded)
    assert bits(loaded.model) == before
    assert {name: getattr(loaded.config, name, None) for name in switches} == switches
    assert torch.equal(answers(loaded), acting)


@pytest.mark.parametrize(
    ("family", "place"), [("mistral", "q_proj"), ("qwen3", "gate_proj"), ("t5", "SelfAttention.q")]
)
def test_a_bias_without_a_place_is_refused_and_nothing_has_changed(family: str, place: str) -> None:
    """Kills: biases that transformers would not read; a switch of attention alone for biases of an MLP, too."""
    loaded = tiny_loaded(family)
    disturb(BitFit().attach(loaded))
    before, config, said = bits(loaded.model), loaded.config.to_dict(), answers(loaded)
    with pytest.raises(AdapterError, match=rf"bitfit cannot be merged: \S*{place} has no bias that a plain {family}"):
        merge(loaded, "default")
    assert (bits(loaded.model), loaded.config.to_dict()) == (before, config)
    assert torch.equal(answers(loaded), said)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_scales_an_output_scales_what_acted_before_it(family: str) -> None:
    """LoRA, IA3 and BitFit on one map, in every order. Kills: factors of the base's weight and bias alone."""
    for order in permutations("abc"):
        loaded = tiny_loaded(family)
        methods = (LoRA(rank=2, targets=("k", "v")), IA3(), BitFit())
        for seed, (name, method) in enumerate(zip("abc", methods, strict=True)):
            disturb(method.attach(loaded, name), seed, 0.3)
        with Route(order).enter():
            acting = answers(loaded)
            merge(loaded, order)
            torch.testing.assert_close(answers(loaded), acting, rtol=0, atol=1e-5)
