"""The laws of a method as functions, for every entry of the table and for the example in the docs.

Cases are (kind, settings) by name; a new entry of the table is a case with its defaults and needs no line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyLoaded, answers, bits, disturb, one_document, tiny_batch, tiny_loaded
from torch import nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.method import Method
from tunesmith.adapt.methods import METHODS
from tunesmith.adapt.store import load_adapter
from tunesmith.core.errors import AdapterError
from tunesmith.models.policy import Policy
from tunesmith.models.ports import base_state
from tunesmith.models.route import BASE, Route

# settings with which a method fits a model of two tiny blocks
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2}, "top_layers": {"layers": 1}, "adapter": {"size": 3}, "subspace": {"dimension": 20},
    "prompt": {"length": 3}, "prefix_embed": {"prefix": 2, "infix": 1}, "prefix_layer": {"length": 3},
    "peft": {"config": {"target_modules": r".*(q_proj|query|attn\.q|c_attn|dense_h_to_4h|qkv_proj|Attention\.q)"}},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, SETTINGS.get(kind, {})) for kind in METHODS.names()} | {
    "adapter lin": ("adapter", {"size": 3, "style": "lin", "activation": "relu"}),
    "adapter pfeiffer": ("adapter", {"size": 3, "style": "pfeiffer", "skip_layers": 1, "activation": "tanh"}),
    "adapter parallel": ("adapter", {"size": 3, "style": "parallel", "activation": "silu"}),
    "ia3 everywhere": ("ia3", {"targets": ("attn", "mlp")}),
    "fpt norms": ("fpt", {"layers": ()}),
    "lora embed": ("lora", {"rank": 2, "targets": ("embed", "up")}),
    "lora ranks": ("lora", {"rank": 2, "alpha": 3.0, "ranks": {"v": 3}}),
    "lora dora": ("lora", {"rank": 2, "targets": ("q", "v", "embed", "down"), "dora": True}),
    "lora pissa": ("lora", {"rank": 2, "targets": ("q", "v", "embed", "down"), "init": "pissa"}),
    "lora whole": ("lora", {"rank": 2, "also_train": ("embed", "norm")}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "gpt2 tied": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "bert": ("bert", {}),
    "t5 tied": ("t5", {}),
    "t5 untied": ("t5", {}),
}
IN_PLACE = {"full", "lp_ft"}
# kinds whose deltas no weight or bias can hold, and families that have no place for the biases of a kind
NO_WEIGHTS = {"adapter", "prompt", "prefix_embed", "prefix_layer", "peft", "fpt"}
NO_BIASES = {"bitfit": {"t5", "gemma", "phi3"}}
# what a family cannot have: case, family and what the refusal names
REFUSED: dict[tuple[str, str], str] = {
    **{(kind, family): family for kind in ("linear_probe", "lp_ft") for family in ("bert", "mpnet")},
    ("peft", "gpt2"): "Conv1D",
    **{("prefix_layer", family): family for family in ("mpnet", "t5")},
}


def built(case: str, table: Mapping[str, tuple[str, dict[str, Any]]] = CASES) -> Method:
    """The method of a case."""
    kind, settings = table[case]
    method: Method = METHODS.load(kind)(**settings)
    return method


def model_of(name: str, folder: Path, **changes: Any) -> TinyLoaded:
    """A model of the table above, or one of a family by its name."""
    family, settings = MODELS.get(name, (name, {}))
    loaded = tiny_loaded(family, folder, **settings, **changes)
    if name == "t5 untied":  # its config says tied whatever it is told
        loaded.model.lm_head.weight = nn.Parameter(loaded.model.lm_head.weight.detach() * 1.5)
        loaded.config.tie_word_embeddings = False
    return loaded


def check_method(method: Method, model: str, dtype: torch.dtype, folder: Path) -> None:
    """Every law of a method on one model: identity, what moves, the base, reload, merging, removal."""
    loaded = model_of(model, folder / "base", dtype=dtype)
    loaded.config.save_pretrained(folder / "base")
    before, said = bits(loaded.model), answers(loaded)
    was = {name: value.detach().clone() for name, value in base_state(loaded.model).items()}
    adapter = method.attach(loaded, seed=3)
    assert torch.equal(answers(loaded), said) or not method.identity_at_start, "step 0 is the base, or it says not"
    train(loaded, adapter)
    after = base_state(loaded.model)
    moved = {name for name, value in after.items() if not torch.equal(value, was[name])}
    assert moved <= set(adapter.parameters) | _ties(loaded), "nothing else changes"
    assert not torch.equal(answers(loaded), said)
    if adapter.route != BASE:
        with BASE.enter():
            assert torch.equal(answers(loaded), said), "disabled is the base, bit for bit"
    _reloads(adapter.save(folder / "run"), loaded, model, dtype)
    if method.kind in IN_PLACE:
        with pytest.raises(AdapterError, match="load the base again"):
            adapter.detach()
        return
    _merges(loaded, adapter, dtype)
    adapter.detach()
    assert bits(loaded.model) == before, "removing it leaves the base bit-identical"
    assert torch.equal(answers(loaded), said)


def train(loaded: TinyLoaded, adapter: Adapter, steps: int = 3) -> None:
    """A few steps; everything that is declared trains, is reached, and nothing else asks for a gradient."""
    parameters = adapter.parameters
    assert list(parameters) == sorted(parameters)
    ids = [id(value) for value in parameters.values()]
    assert len(set(ids)) == len(ids)
    assert {id(p) for p in loaded.model.parameters() if p.requires_grad} == set(ids), "what is declared is what trains"
    start = {name: value.detach().clone() for name, value in parameters.items()}
    policy = Policy(loaded, adapter.route)
    # steps of a fixed size, so that bfloat16 moves and key biases, whose gradient is rounding noise, do too
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05, eps=1e-30)
    policy.train(True)
    batch = tiny_batch((9, 12, 7))
    for _ in range(steps):
        encoder = loaded.family.kind == "encoder"
        loss = policy.hidden(batch).float().pow(3).mean() if encoder else policy.token_losses(batch).mean()
        loss.backward()
        unreached = [name for name, value in parameters.items() if value.grad is None]
        for name in unreached:  # a pooler, a table of token types
            parameters[name].data += 0.125
        optimizer.step()
        optimizer.zero_grad()
    policy.train(False)
    still = [name for name, value in parameters.items() if torch.equal(value, start[name])]
    assert still == [], "everything declared changes"


def check_rows(method: Method, model: str, folder: Path) -> None:
    """Rows of one batch on routes of their own are what each is alone; two adapters act together, apart, and leave."""
    loaded = model_of(model, folder)
    before = bits(loaded.model)
    adapters = [method.attach(loaded, name, seed=seed) for seed, name in enumerate(("a", "b"))]
    for seed, adapter in enumerate(adapters):
        disturb(adapter, seed, 0.2)
    policy, batch = Policy(loaded), tiny_batch((7, 3, 9, 5))
    rows = (("a",), (), ("b",), ("a", "b") if not adapters[0].replaced else ("b",))
    with torch.no_grad():
        alone = [_states(policy.under(Route(names)), one_document(batch, row)) for row, names in enumerate(rows)]
        mixed = _states(policy.under(Route.of_rows(*rows)), batch)
        torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        said = [_states(policy.under(Route(names)), batch) for names in ((), ("a",), ("b",))]
    assert len({value.numpy().tobytes() for value in said}) == 3
    adapters[0].detach()
    with torch.no_grad():
        assert torch.equal(_states(policy.under(Route(("b",))), batch), said[2]), "others stay when one leaves"
    adapters[1].detach()
    assert bits(loaded.model) == before


def save_all(cases: Iterator[str], model: str, folder: Path) -> dict[str, torch.Tensor]:
    """Saves an adapter of each case in a folder of its name and answers what each says."""
    told = {}
    for case in cases:
        loaded = model_of(model, folder / "base")
        adapter = built(case).attach(loaded, seed=3)
        disturb(adapter)
        told[case] = answers(loaded)
        adapter.save(folder / case.replace(" ", "-"))
    return told


def answer_all(model: str, folder: Path) -> dict[str, torch.Tensor]:
    """What everything that `save_all` has saved says now."""
    told = {}
    for path in sorted(folder.glob("*/*/adapter_config.json")):
        loaded = model_of(model, folder / "base")
        load_adapter(loaded, path.parent)
        told[path.parts[-3]] = answers(loaded)
    return told


def _states(policy: Policy, batch: Any) -> torch.Tensor:
    return policy.hidden(batch) if policy.family.kind == "encoder" else policy.token_losses(batch)


def _ties(loaded: TinyLoaded) -> set[str]:
    """Other names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in loaded.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _reloads(path: Path, loaded: TinyLoaded, model: str, dtype: torch.dtype) -> None:
    if path.name == "model":
        plain = type(loaded.model).from_pretrained(path, dtype=dtype).eval()
        again = TinyLoaded(plain, path, "", loaded.family, "", plain.config)
        Policy(again)
    else:
        again = model_of(model, loaded.folder, dtype=dtype)
        Policy(again)
        load_adapter(again, path)
    assert torch.equal(answers(again), answers(loaded)), "what was saved answers the same"


def _merges(loaded: TinyLoaded, adapter: Adapter, dtype: torch.dtype) -> None:
    """A change of weights and biases: merged is unmerged, unmerging is exact. What is none is refused by its name."""
    if dtype != torch.float32 or not adapter.inserts():
        return
    held, said, kind = bits(loaded.model), answers(loaded), adapter.method.kind
    method = type(adapter.method)
    is_no_change = method.weight is Method.weight and method.fold is Method.fold
    if is_no_change or kind in NO_WEIGHTS or loaded.family.name in NO_BIASES.get(kind, ()):
        with pytest.raises(AdapterError, match=f"{kind} .*cannot be merged"):
            merge(loaded, adapter.name)
        assert bits(loaded.model) == held
        assert torch.equal(answers(loaded), said)
        return
    merge(loaded, adapter.name)
    torch.testing.assert_close(answers(loaded), said, rtol=1e-4, atol=1e-4 * float(said.abs().max()))
    unmerge(loaded)
    assert bits(loaded.model) == held
    assert torch.equal(answers(loaded), said)
