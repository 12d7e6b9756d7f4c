"""Sums of adapters: the sum of the changes, at every map, saved and merged like any other."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny_models import TinyLoaded, answers, disturb, tiny_loaded, tiny_model

import tunesmith as ts
from tunesmith.adapt.bitfit import BitFit
from tunesmith.adapt.combine import combine
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.inserts import spread
from tunesmith.models.ports import ports
from tunesmith.models.route import Route

pytestmark = pytest.mark.filterwarnings("ignore")


def parts(family: str, folder: Path = Path()) -> TinyLoaded:
    """A model with three adapters of different maps, ranks, scales and starts."""
    loaded = tiny_loaded(family, folder / "base")
    for seed, (name, method) in enumerate(
        {
            "a": LoRA(rank=3, targets=("q", "v")),
            "b": LoRA(rank=4, alpha=5, rslora=True, targets=("v", "down"), ranks={"down": 2}),
            "c": LoRA(rank=2, alpha=3, targets=("q", "embed"), init="pissa"),
        }.items()
    ):
        disturb(method.attach(loaded, name), seed)
    return loaded


def changes(loaded: TinyLoaded, name: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to each map's weight, from its factors alone, in float64: [inputs, outputs]."""
    found: dict[str, torch.Tensor] = {}
    for port in ports(loaded.model):
        for insert in port.of(name):
            a, b = (insert[factor].detach().double() for factor in "AB")
            change = b @ a
            if "A0" in insert._buffers:
                change = change - insert.B0.double() @ insert.A0.double()
            flipped = (change * insert.scale).T
            flipped = flipped if insert.rows is None else spread(flipped, insert.rows)
            found[port.path] = found.get(port.path, 0) + flipped
    return found


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": -1.0}, {"c": 1.0, "a": 0.3, "b": 0.7}, {"b": -1.0}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_the_change_is_the_weighted_sum(family: str, weights: dict[str, float]) -> None:
    """At every map, in float64. Kills: a weight on both factors; one scale for all; roles of a fused map mixed up."""
    loaded = parts(family)
    made = combine(loaded, weights, name="sum")
    wanted: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for path, change in changes(loaded, name).items():
            wanted[path] = wanted.get(path, 0) + weight * change
    found = changes(loaded, "sum")
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(found[path], change, rtol=0, atol=1e-6 * float(change.abs().max()))
    assert made.route == Route(("sum",))
    assert all(value.requires_grad for value in made.parameters.values())


def test_adding_and_taking_away_is_exact() -> None:
    """a + b is both at once, a - a is nothing. Kills: factors that the sum shares with its parts."""
    loaded = parts("llama")
    combine(loaded, {"a": 1.0, "b": 1.0}, name="both")
    with Route(("a", "b")).enter():
        together = answers(loaded)
    with Route(("both",)).enter():
        torch.testing.assert_close(answers(loaded), together, rtol=0, atol=1e-5)
    combine(loaded, {"a": 1.0}, name="same")
    with Route(("a",)).enter():
        said = answers(loaded)
    with Route(("same",)).enter():
        torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-6)
    combine(loaded, {"same": -1.0}, name="away")
    with Route(("same", "away")).enter():
        torch.testing.assert_close(answers(loaded), answers(tiny_loaded("llama")), rtol=0, atol=1e-5)
    disturb(combine(loaded, {"a": 0.0}, name="none"))
    with Route(("a",)).enter():
        assert torch.equal(answers(loaded), said)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_sum_is_saved_loaded_and_merged_like_any_other(family: str, tmp_path: Path) -> None:
    """Also by peft. Kills: a rank beyond the map refused on the way back; padding that is not zero."""
    loaded = parts(family, tmp_path)
    loaded.config.save_pretrained(tmp_path / "base")
    made = combine(loaded, {"a": 0.5, "b": -1.0, "c": 2.0}, name="sum")
    combine(loaded, {"sum": 1.0, "a": 1.0, "b": 1.0, "c": 1.0}, name="large")
    assert max(insert["A"].shape[0] for port in ports(loaded.model) for insert in port.of("large")) > 12
    with made.route.enter():
        said = answers(loaded)
    saved = save_adapter(made, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), saved).eval()
    there = answers(TinyLoaded(theirs, loaded.folder, "", loaded.family, "", loaded.config))
    torch.testing.assert_close(there, said, rtol=0, atol=1e-5)
    again = tiny_loaded(family)
    assert load_adapter(again, saved).method == made.method
    assert torch.equal(answers(again), said)
    merge(loaded, made.name)
    torch.testing.assert_close(answers(loaded), said, rtol=0, atol=1e-5)
    unmerge(loaded)


def test_maps_that_no_list_of_roles_describes_are_kept_too(tmp_path: Path) -> None:
    """One map of one layer. Kills: a sum that spreads to all maps of the role when it is loaded."""
    loaded = tiny_loaded("llama", tmp_path / "base")
    loaded.config.save_pretrained(tmp_path / "base")
    disturb(LoRA(rank=2, targets=("layers.1.mlp.up_proj", "q")).attach(loaded, "a"))
    made = combine(loaded, {"a": -0.25}, name="sum")
    assert len(made.inserts()) == 3
    with Route(("sum",)).enter():
        said = answers(loaded)
    save_adapter(made, tmp_path / "sum")
    again = tiny_loaded("llama")
    assert len(load_adapter(again, tmp_path / "sum").inserts()) == 3
    torch.testing.assert_close(answers(again), said, rtol=0, atol=1e-6)


def test_sums_across_ranks_beyond_a_map_come_back_from_disk(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama", tmp_path / "base")
    for name in "abc":
        disturb(LoRA(rank=16, targets=("k",)).attach(loaded, name), ord(name))
    made = combine(loaded, dict.fromkeys("abc", 1 / 3), name="mean")
    assert made.inserts()[0][2]["A"].shape[0] == 48
    with made.route.enter():
        said = answers(loaded)
    save_adapter(made, tmp_path / "mean")
    again = tiny_loaded("llama")
    load_adapter(again, tmp_path / "mean")
    assert torch.equal(answers(again), said)


def test_what_has_no_sum_is_refused_by_name() -> None:
    assert ts.combine is combine
    for method, told in (
        (BitFit(), "x is bitfit, whose change is no low-rank matrix"),
        (LoRA(rank=2, dora=True), "x is dora"),
        (LoRA(rank=2, also_train=("norm",)), "x trains whole parameters"),
    ):
        loaded = tiny_loaded("gpt2")
        LoRA(rank=2).attach(loaded, "a")
        method.attach(loaded, "x")
        with pytest.raises(AdapterError, match=told):
            combine(loaded, {"a": 1.0, "x": 1.0})
    loaded = parts("llama")
    with pytest.raises(AdapterError, match="no adapter 'z' is attached"):
        combine(loaded, {"z": 1.0})
    with pytest.raises(AdapterError, match="an adapter 'a' is attached already"):
        combine(loaded, {"a": 1.0}, name="a")
    with pytest.raises(ConfigError, match="at least one"):
        combine(loaded, {})
    with pytest.raises(ConfigError, match="weights: a: inf"):
        combine(loaded, {"a": float("inf")})
