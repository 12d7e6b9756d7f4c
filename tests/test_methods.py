"""Laws of every method in the table: one function, run over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyLoaded, answers, bits, tiny_batch, tiny_loaded

from tunesmith.adapt.method import Method
from tunesmith.adapt.methods import METHODS
from tunesmith.adapt.store import load_adapter
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.policy import Policy
from tunesmith.models.ports import base_state
from tunesmith.models.route import BASE

# settings with which a method fits a model of two tiny blocks
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2}, "top_layers": {"layers": 1}, "adapter": {"size": 3}, "subspace": {"dimension": 20}
}  # fmt: skip
IN_PLACE = {"full", "lp_ft"}
# what a family cannot have: the method says so by name
REFUSED = {(kind, family): "bert|mpnet" for kind in ("linear_probe", "lp_ft") for family in ("bert", "mpnet")}


def check_method(method: Method, family: str, dtype: torch.dtype, folder: Path) -> None:
    """Every law of a method on one model: identity, what moves, the base, reload, removal."""
    loaded = tiny_loaded(family, folder / "base", dtype=dtype)
    loaded.config.save_pretrained(folder / "base")
    before, said = bits(loaded.model), answers(loaded)
    frozen_before = {name: value.detach().clone() for name, value in base_state(loaded.model).items()}
    adapter = method.attach(loaded, seed=3)
    assert torch.equal(answers(loaded), said) == method.identity_at_start, "step 0 is the base, or the method says not"
    assert list(adapter.parameters) == sorted(adapter.parameters)
    ids = [id(value) for value in adapter.parameters.values()]
    assert len(set(ids)) == len(ids)
    assert {id(p) for p in loaded.model.parameters() if p.requires_grad} == set(ids), "what is declared is what trains"
    start = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    _train(loaded, adapter.parameters, Policy(loaded, adapter.route))
    still = [name for name, value in adapter.parameters.items() if torch.equal(value, start[name])]
    assert still == [], "everything declared changes"
    after = base_state(loaded.model)
    moved = {name for name, value in after.items() if not torch.equal(value, frozen_before[name])}
    assert moved <= set(adapter.parameters) | _ties(loaded), "nothing else changes"
    assert not torch.equal(answers(loaded), said)
    if adapter.route != BASE:
        with BASE.enter():
            assert torch.equal(answers(loaded), said), "disabled is the base, bit for bit"
    _reloads(adapter.save(folder / "run"), loaded, family, dtype)
    if method.kind in IN_PLACE:
        with pytest.raises(AdapterError, match="load the base again"):
            adapter.detach()
        return
    adapter.detach()
    assert bits(loaded.model) == before, "removing it leaves the base bit-identical"
    assert torch.equal(answers(loaded), said)


def _train(loaded: TinyLoaded, parameters: dict[str, torch.nn.Parameter], policy: Policy) -> None:
    batch = tiny_batch((9, 12, 7))
    # steps of a fixed size, so that bfloat16 moves and key biases, whose gradient is rounding noise, do too
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05, eps=1e-30)
    policy.train(True)
    for _ in range(3):
        if loaded.family.kind == "decoder":
            loss = policy.token_losses(batch).mean()
        else:
            loss = policy.hidden(batch).float().pow(3).mean()
        loss.backward()
        unreached = [name for name, value in parameters.items() if value.grad is None]
        for name in unreached:  # a pooler, a table of token types
            parameters[name].data += 0.125
        optimizer.step()
        optimizer.zero_grad()
    policy.train(False)


def _ties(loaded: TinyLoaded) -> set[str]:
    """Other names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in loaded.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _reloads(path: Path, loaded: TinyLoaded, family: str, dtype: torch.dtype) -> None:
    if path.name == "model":
        model = type(loaded.model).from_pretrained(path, dtype=dtype).eval()
        again = TinyLoaded(model, path, "", loaded.family, "", model.config)
        Policy(again)
    else:
        again = tiny_loaded(family, loaded.folder, dtype=dtype)
        Policy(again)
        load_adapter(again, path)
    assert torch.equal(answers(again), answers(loaded)), "what was saved answers the same"


@pytest.mark.parametrize("kind", METHODS.names())
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox", "phi3", "opt", "bert", "mpnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_method_keeps_the_laws(kind: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Kills: a parameter that is declared and never moves, moved and not declared, or trained and not saved."""
    method = METHODS.load(kind)(**SETTINGS.get(kind, {}))
    if (kind, family) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[kind, family]):
            method.attach(tiny_loaded(family))
        return
    check_method(method, family, dtype, tmp_path)


@pytest.mark.parametrize("kind", METHODS.names())
def test_a_method_is_a_section_with_defaults(kind: str) -> None:
    method = METHODS.load(kind)()
    assert method.kind == kind
    assert METHODS.summary(kind)
    assert type(method).model_validate(method.model_dump(mode="json")) == method


def test_two_blocks_of_gpt2_medium_are_the_published_number() -> None:
    """FT-Top2 of the LoRA paper. Kills: the final norm or the head counted in."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tunesmith.models.families import family_of

    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    loaded = TinyLoaded(model, Path(), "gpt2-medium", family_of(config), "", config)
    adapter = METHODS.load("top_layers")(layers=2).attach(loaded)
    assert sum(value.numel() for value in adapter.parameters.values()) == 25_192_448
    adapter.detach()
    adapter = METHODS.load("lora")(rank=4).attach(loaded)
    assert sum(value.numel() for value in adapter.parameters.values()) == 24 * 2 * 4 * 2048
