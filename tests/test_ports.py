"""Ports and routes: base names, ties and bytes stay; what acts is what the route says."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    FAMILY_NAMES,
    IDS,
    TinyLoaded,
    answers,
    bits,
    disturb,
    families,
    roles_of,
    tiny_config,
    tiny_loaded,
)
from torch import nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import AdapterError
from tunesmith.models.families import family_of
from tunesmith.models.inserts import Insert, gathered
from tunesmith.models.ports import base_state, port_kind, ports
from tunesmith.models.recompute import recompute
from tunesmith.models.route import BASE, Route, Segments, checkpoint_contexts, current_route, current_segments
from tunesmith.models.targets import block_paths, match


@pytest.mark.parametrize("family", families(*FAMILY_NAMES))
def test_attaching_changes_neither_names_nor_bytes_nor_answers(family: str) -> None:
    """Kills: registering the base module below the port; a first factor pair that is not zero."""
    loaded = tiny_loaded(family)
    before, said, names = bits(loaded.model), answers(loaded), list(loaded.model.state_dict())
    modules = dict(loaded.model.named_modules())
    adapter = LoRA(rank=2, targets=roles_of(family)).attach(loaded)
    assert list(base_state(loaded.model)) == names
    assert bits(loaded.model) == before
    assert torch.equal(answers(loaded), said)
    disturb(adapter)
    assert not torch.equal(answers(loaded), said)
    with BASE.enter():
        assert torch.equal(answers(loaded), said)
    adapter.detach()
    after = dict(loaded.model.named_modules())
    assert list(after) == list(modules)
    assert all(after[path] is module for path, module in modules.items())
    assert torch.equal(answers(loaded), said)


@pytest.mark.parametrize("family", families(*FAMILY_NAMES))
def test_only_inserts_train_and_the_base_stays_bit_identical(family: str) -> None:
    """Kills: leaving the base unfrozen."""
    loaded = tiny_loaded(family)
    before = bits(loaded.model)
    adapter = LoRA(rank=2, targets=roles_of(family)).attach(loaded)
    assert {id(p) for p in loaded.model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters.values()}
    start = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=0.01)
    more = {"decoder_input_ids": IDS} if loaded.family.kind == "seq2seq" else {}
    for _ in range(3):
        output = loaded.model(input_ids=IDS, **more)
        (output.logits if "logits" in output else output.last_hidden_state).square().mean().backward()
        assert all(p.grad is None for p in loaded.model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert bits(loaded.model) == before
    assert [name for name, value in adapter.parameters.items() if torch.equal(value, start[name])] == []


@pytest.mark.parametrize("family", families("gemma", "gpt2"))
def test_tied_weights_stay_one_parameter(family: str) -> None:
    loaded = tiny_loaded(family)
    LoRA(rank=2, targets=("embed", "head")).attach(loaded)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert not any("weight" in name and "inserts" in name for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize("family", families("llama", "gpt2", "gpt_neox", "t5"))
def test_a_model_without_data_gets_ports_and_counts(family: str) -> None:
    real = LoRA(rank=2).attach(tiny_loaded(family))
    with torch.device("meta"):
        model = type(tiny_loaded(family).model)(tiny_config(family))
    shapes = TinyLoaded(model, real.loaded.folder, family, family_of(model.config), "", model.config)
    adapter = LoRA(rank=2).attach(shapes)
    assert {n: p.shape for n, p in adapter.parameters.items()} == {n: p.shape for n, p in real.parameters.items()}
    assert all(parameter.is_meta for parameter in adapter.parameters.values())


def test_a_replaced_or_cast_parameter_is_seen_by_port_and_module_alike() -> None:
    loaded = tiny_loaded("llama")
    modules = dict(loaded.model.named_modules())
    adapter = LoRA(rank=2).attach(loaded)
    port = ports(loaded.model)[0]
    port.weight = nn.Parameter(torch.ones_like(port.weight))
    assert modules[port.path].weight is port.weight
    twin = copy.deepcopy(loaded.model)
    assert torch.equal(twin(IDS).logits, loaded.model(IDS).logits)
    adapter.detach()
    assert bool((modules[port.path].weight == 1).all())


@pytest.mark.parametrize("name", ["lora", "weight", "default", "type", "keys", "inserts", "training"])
def test_an_adapter_may_have_any_ordinary_name(name: str) -> None:
    loaded = tiny_loaded("llama")
    adapter = LoRA(rank=2).attach(loaded, name)
    disturb(adapter)
    with Route((name,)).enter():
        acting = answers(loaded)
    with BASE.enter():
        assert not torch.equal(answers(loaded), acting)
    adapter.detach()


def test_several_adapters_ask_for_a_route_and_add_up() -> None:
    """Kills: all attached adapters acting by default; only the first of a route acting."""
    loaded = tiny_loaded("llama")
    first, second = LoRA(rank=2, targets=("down",)).attach(loaded, "a"), LoRA(rank=1).attach(loaded, "b")
    disturb(first, 1)
    disturb(second, 2)
    with pytest.raises(AdapterError, match=r"several adapters are attached: a, b(.|\n)*with route"):
        answers(loaded)
    with first.route.enter():
        one = answers(loaded)
    with Route(("a", "b")).enter():
        both = answers(loaded)
    with second.route.enter():
        two = answers(loaded)
    assert not torch.equal(one, both)
    assert not torch.equal(two, both)
    with Route(("c",)).enter(), pytest.raises(AdapterError, match="no adapter 'c'"):
        answers(loaded)
    with pytest.raises(AdapterError, match="attached already"):
        LoRA().attach(loaded, "a")
    second.detach()
    assert torch.equal(answers(loaded), one)


def test_a_recomputation_enters_what_its_forward_saw() -> None:
    with Route(("a",)).enter(), Segments((2, 3)).enter():
        _, again = checkpoint_contexts()
    assert current_route() is None
    with again:
        assert current_route() == Route(("a",))
        assert current_segments() == Segments((2, 3))
    assert current_segments() is None


def test_gradients_outside_the_route_are_those_inside_it() -> None:
    """Kills: a recomputation under the default route (two adapters: an error; one: another gradient)."""
    gradients = []
    for again in (False, True):
        loaded = tiny_loaded("llama")
        first, second = LoRA(rank=2).attach(loaded, "a"), LoRA(rank=2).attach(loaded, "b")
        disturb(first, 1)
        disturb(second, 2)
        if again:
            recompute([loaded.model.get_submodule(path) for path in block_paths(loaded.model, loaded.family)])
        with first.route.enter():
            loss = loaded.model(IDS).logits.square().mean()
        with second.route.enter():
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in first.parameters.items()})
        assert all(parameter.grad is None for parameter in second.parameters.values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class Gains:
    """The smallest method for norms: adds to their gains, and to their biases where they have one."""

    kind = "gains"

    def delta(self, insert: Insert, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        changes = dict(insert.named_parameters())
        return insert.rerun(x, **changes) - insert.rerun(x)

    def weight(self, insert: Insert) -> None:
        return None


@pytest.mark.parametrize("family", families(*FAMILY_NAMES, "falcon"))
def test_a_change_of_gains_beside_a_norm_is_that_change_of_the_norm(family: str) -> None:
    """Kills: gain times output, which is wrong for gemma's 1 + w and for biases; a norm without a port."""
    loaded, wanted = tiny_loaded(family), tiny_loaded(family)
    said = answers(loaded)
    draw = torch.Generator().manual_seed(5)
    adapter = Adapter("a", Gains(), loaded)
    for target in match(loaded.model, loaded.family, ["norm"]):
        module = wanted.model.get_submodule(target.path)
        changes = {name: 0.3 * torch.randn(p.shape, generator=draw) for name, p in module.named_parameters()}
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter += changes[name]
        factors = {name: nn.Parameter(change) for name, change in changes.items()}
        adapter.add(target, Insert(Gains(), factors, None, 1.0))
    adapter.close()
    assert not torch.allclose(answers(loaded), said, atol=1e-3)
    torch.testing.assert_close(answers(loaded), answers(wanted), rtol=0, atol=5e-6)
    with BASE.enter():
        assert torch.equal(answers(loaded), said)


@pytest.mark.parametrize("family", families("llama", "gpt2", "phi3", "gpt_neox"))
def test_an_insert_can_ask_its_base_map_for_another_input(family: str) -> None:
    """Kills: the bias counted; a fused map's other roles in the answer; gpt2's weight the wrong way round."""
    loaded = tiny_loaded(family)
    adapter = LoRA(rank=2, targets=("v", "down")).attach(loaded)
    for port, _, insert in adapter.inserts():
        width = port.weight.shape[0 if port_kind(port) == "conv1d" else 1]
        x, zero = torch.randn(3, width), torch.zeros(3, width)
        whole = port.base(x) - port.base(zero)
        wanted = whole if insert.rows is None else gathered(whole, insert.rows)
        torch.testing.assert_close(insert.mapped(x), wanted, rtol=1e-5, atol=1e-5)
