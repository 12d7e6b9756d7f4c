"""Layer prefixes: keys and values before those of a document, in every way that attention runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    DECODERS,
    TinyLoaded,
    disturb,
    families,
    one_document,
    tiny_batch,
    tiny_config,
    tiny_loaded,
    tiny_model,
)
from torch import Tensor
from transformers import DynamicCache

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.prefix_layer import PrefixLayer
from tunesmith.adapt.prompt import Prompt
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.attention import attend
from tunesmith.models.families import family_of
from tunesmith.models.generate import generate, stream
from tunesmith.models.inserts import Keys
from tunesmith.models.policy import Policy
from tunesmith.models.prefixes import preceding
from tunesmith.models.route import BASE, Route, Segments
from tunesmith.models.soft import Holes

BATCH = tiny_batch((7, 3, 9, 5))
ROWS = (("k", "m"), (), ("m", "p"), ("a", "k"))
MIXED = Route.of_rows(*ROWS)
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3_text")
ENCODERS = ["bert", "distilbert", "roberta"]
PROMPTS = [list(range(3 + 5 * row, 3 + 5 * row + length)) for row, length in enumerate((4, 9, 1, 6, 6, 2))]
PROMPT_ROWS = Route.of_rows(("k",), (), ("m", "p"), ("m",), ("k", "a"), ("p",))


def adapters_of(family: str) -> tuple[TinyLoaded, dict[str, Adapter]]:
    """A model with prefixes k of 4 and m of 2, a prompt p of 3 and a LoRA a."""
    loaded = tiny_loaded(family)
    lora = LoRA(rank=2, targets=("k", "up"))
    methods = {"k": PrefixLayer(length=4), "m": PrefixLayer(length=2), "p": Prompt(length=3), "a": lora}
    found = {name: method.attach(loaded, name) for name, method in methods.items()}  # type: ignore[attr-defined]
    for number, adapter in enumerate(found.values()):
        disturb(adapter, number, 0.6)
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(True)
    return loaded, found


def cache_of(loaded: Any, adapter: Adapter) -> DynamicCache:
    """The prefix as transformers holds what has been read: the reference that knows nothing of prefixes."""
    sides: dict[str, list[Tensor]] = {"k": [], "v": []}
    config = loaded.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for _, role, insert in adapter.inserts():
        assert isinstance(insert, Keys)
        sides[role].append(insert.states().view(insert.length, heads, -1).transpose(0, 1)[None])
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(sides["k"], sides["v"], strict=True)):
        cache.update(keys, values, layer)
    return cache


@pytest.mark.parametrize("family", families(*[name for name in DECODERS if name not in WINDOWED]))
@pytest.mark.parametrize("packed", [True, False])
def test_a_prefix_is_a_cache_that_was_filled_before(family: str, packed: bool) -> None:
    """Kills: a causal mask counted from the prefix; positions from 0; keys that share heads mixed up."""
    loaded, adapters = adapters_of(family)
    policy = Policy(loaded, adapters["k"].route, packed=packed)  # type: ignore[arg-type]
    found = policy.logits(BATCH, torch.arange(len(BATCH.ids)))
    with BASE.enter():
        wanted = [
            loaded.model(one_document(BATCH, row).ids[None], past_key_values=cache_of(loaded, adapters["k"])).logits[0]
            for row in range(4)
        ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)
    parameters = list(adapters["k"].parameters.values())
    mine = torch.autograd.grad(found.square().sum(), parameters)
    theirs = torch.autograd.grad(torch.cat(wanted).square().sum(), parameters)
    for one, two in zip(mine, theirs, strict=True):
        assert float((one - two).norm()) <= 1e-5 * float(two.norm())


def softmaxed(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, cap: float | None) -> Tensor:
    """Attention as it is written in books, in float64: [heads, tokens, width]."""
    times = query.shape[0] // key.shape[0]
    key, value = key.double().repeat_interleave(times, 0), value.double().repeat_interleave(times, 0)
    scores = query.double() @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_with_prefixes_is_softmax_over_them_and_the_document(
    causal: bool, cap: float | None, window: int | None
) -> None:
    """A prefix stays in sight however narrow the window. Kills: rows that take each other's prefix."""
    if window is not None and not causal:
        return
    loaded, _ = adapters_of("llama")
    module = loaded.model.model.layers[1].self_attn
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 24, 8, generator=draw) for heads in (4, 2, 2))
    with MIXED.enter(), Segments(BATCH.lengths).enter(), Holes((0, 0)).enter(), torch.no_grad():
        found, _ = attend(module, query, key, value, None, is_causal=causal, sliding_window=window, softcap=cap)
        pairs = preceding(module, key, 4)
    assert pairs is not None
    assert [0 if pair is None else pair[0].shape[1] for pair in pairs] == [6, 0, 2, 4]
    start = 0
    for length, pair in zip(BATCH.lengths, pairs, strict=True):
        end = start + length
        ahead = 0 if pair is None else pair[0].shape[1]
        parts = [(key[0, :, start:end], value[0, :, start:end])]
        keys, values = (torch.cat(side, 1) for side in zip(*([pair] if pair else []), *parts, strict=True))
        at, to = torch.arange(length)[:, None], torch.arange(length)[None]
        own = ((to <= at) | (not causal)) & (to > at - (window or 99))
        seen = torch.cat([torch.ones(length, ahead, dtype=torch.bool), own], 1)
        wanted = softmaxed(query[0, :, start:end], keys, values, seen, cap).transpose(0, 1)
        torch.testing.assert_close(found[0, start:end].double(), wanted, rtol=0, atol=1e-5)
        start = end


def states(policy: Policy, batch: Any) -> Tensor:
    return policy.hidden(batch)


@pytest.mark.parametrize("family", families(*DECODERS, *ENCODERS))
@pytest.mark.parametrize("packed", [True, False])
def test_rows_with_prefixes_of_different_length_are_rows_alone(family: str, packed: bool) -> None:
    """Kills: a prefix on its neighbour's row; the longest prefix seen by all; positions of another row."""
    loaded, adapters = adapters_of(family)
    policy = Policy(loaded, packed=packed)  # type: ignore[arg-type]
    mixed = states(policy.under(MIXED), BATCH)
    alone = [states(policy.under(Route(names)), one_document(BATCH, row)) for row, names in enumerate(ROWS)]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=0, atol=1e-5)
    with torch.no_grad():
        padded = states(Policy(loaded, MIXED, packed=not packed), BATCH)  # type: ignore[arg-type]
    torch.testing.assert_close(mixed, padded, rtol=0, atol=1e-5)
    parameters = [p for name in "kmpa" for p in adapters[name].parameters.values()]
    # of no function that a last norm leaves alone: the gradients of such a one are what rounding leaves
    pull = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad((mixed * pull).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((torch.cat(alone) * pull).sum(), parameters, allow_unused=True)
    for one, two in zip(mine, theirs, strict=True):
        assert float((one - two).norm()) <= 2e-5 * float(two.norm()) + 1e-5


@pytest.mark.parametrize("family", families("llama", "gpt2", "gemma2", "phi3"))
def test_recomputation_sees_the_prefixes_of_its_forward(family: str) -> None:
    """Kills: a recomputation without room, without rows, or with another prefix."""
    found = []
    for how in ("none", "full"):
        loaded, adapters = adapters_of(family)
        losses = Policy(loaded, MIXED, recompute=how).token_losses(BATCH)  # type: ignore[arg-type]
        losses.sum().backward()
        found.append([p.grad for name in "kmpa" for p in adapters[name].parameters.values()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))  # type: ignore[arg-type]


def continued(loaded: Any, names: tuple[str, ...], prompt: list[int], limit: int) -> list[int]:
    """Greedy continuation without a cache, each step a document of its own."""
    ids, policy = list(prompt), Policy(loaded, Route(names))
    for _ in range(limit):
        batch = tiny_batch((len(ids),))
        batch = type(batch)(torch.tensor(ids), batch.positions, batch.lengths, batch.sources, batch.targets, batch.rows)
        with torch.no_grad():
            ids.append(int(policy.logits(batch, torch.tensor([len(ids) - 1]))[0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", families(*DECODERS))
def test_writing_behind_prefixes_is_writing_without_a_cache(family: str) -> None:
    """Kills: a prefix in the cache; a mask one column short; a row that leaves and takes another's prefix along."""
    loaded, _ = adapters_of(family)
    free = [continued(loaded, PROMPT_ROWS.of(row), prompt, 8) for row, prompt in enumerate(PROMPTS)]
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": set()}
    found = generate(loaded, PROMPT_ROWS, PROMPTS, **settings)  # type: ignore[arg-type]
    assert [one.ids for one in found] == free
    settings["stop_ids"] = {ids[row] for row, ids in enumerate(free)}
    alone = [
        generate(loaded, Route(PROMPT_ROWS.of(row)), [prompt], **settings)[0]  # type: ignore[arg-type]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert generate(loaded, PROMPT_ROWS, PROMPTS, batch_size=4, **settings) == alone  # type: ignore[arg-type]
    for row, prompt in enumerate(PROMPTS):
        assert list(stream(loaded, Route(PROMPT_ROWS.of(row)), prompt, **settings)) == alone[row].ids  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_shared_beginning_is_read_behind_the_prefix(family: str) -> None:
    """Kills: positions of what is shared that leave the prefix out."""
    loaded, _ = adapters_of(family)
    shared, settings = [7, 9, 21], {"max_new_tokens": 8, "stop_ids": set[int]()}
    for route in (Route(("k",)), Route(("m", "p")), PROMPT_ROWS):
        whole = generate(loaded, route, [shared + prompt for prompt in PROMPTS], **settings)  # type: ignore[arg-type]
        assert generate(loaded, route, PROMPTS, shared_prefix=shared, **settings) == whole  # type: ignore[arg-type]


def test_a_prefix_starts_as_words_that_were_read() -> None:
    """Kills: keys before their rotation; a seed without effect; values for keys."""
    loaded = tiny_loaded("llama")
    adapter = PrefixLayer(length=5).attach(loaded, seed=4)  # type: ignore[arg-type]
    policy = Policy(loaded, adapter.route)  # type: ignore[arg-type]
    with torch.no_grad():
        found = policy.hidden(BATCH)[:7]
    heard = [insert.states() for _, _, insert in adapter.inserts() if isinstance(insert, Keys)]
    table, matches = loaded.model.get_input_embeddings().weight, []
    value = loaded.model.model.layers[0].self_attn.v_proj
    with torch.no_grad(), BASE.enter():
        every = value(loaded.model.model.layers[0].input_layernorm(table))
        matches = [int((every - state).norm(dim=1).argmin()) for state in heard[1]]
        read = Policy(
            loaded
        ).hidden(  # type: ignore[arg-type]
            type(BATCH)(
                torch.tensor([*matches, *BATCH.ids[:7]]), torch.arange(12), (12,), *([BATCH.sources] * 2), ("",)
            )
        )
    torch.testing.assert_close(found, read[5:], rtol=0, atol=1e-5)


def test_a_prefix_made_by_a_map_is_what_the_map_makes() -> None:
    """Every part of the map learns. Kills: a map of each block's own; a trunk that nothing trains."""
    loaded = tiny_loaded("gpt2")
    adapter = PrefixLayer(length=3, reparameterise=True).attach(loaded)  # type: ignore[arg-type]
    trunk, last = 3 * 32 + 32 * 512 + 512, 4 * (512 * 32 + 32)
    assert sum(p.numel() for p in adapter.parameters.values()) == trunk + last
    Policy(loaded, adapter.route).token_losses(BATCH).sum().backward()  # type: ignore[arg-type]
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters.values())
    made = [insert for _, _, insert in adapter.inserts() if isinstance(insert, Keys)]
    parts = adapter.parameters
    middle = torch.tanh(
        parts["transformer.h.0.attn.c_attn.prefix.table"] @ parts["transformer.h.0.attn.c_attn.prefix.weight"].T
    )
    name = "transformer.h.1.attn.c_attn.v"
    wanted = middle @ parts[f"{name}.weight"].T + parts[f"{name}.bias"]
    torch.testing.assert_close(made[3].states(), wanted)


def test_numbers_of_a_prefix_are_counted_without_weights() -> None:
    """The LoRA paper's PreLayer on GPT-3 with 8 + 8 is 18.87 M by its own formula."""
    for family in ("llama", "gpt2", "phi3", "bert"):
        for method in (PrefixLayer(length=3), PrefixLayer(length=3, reparameterise=True)):
            real = method.attach(tiny_loaded(family))  # type: ignore[arg-type]
            with torch.device("meta"):
                model = type(tiny_model(family))(tiny_config(family))
            shapes = TinyLoaded(model, real.loaded.folder, family, family_of(model.config, model), "", model.config)
            adapter = method.attach(shapes)  # type: ignore[arg-type]
            assert {n: p.shape for n, p in adapter.parameters.items()} == {
                n: p.shape for n, p in real.parameters.items()
            }
            assert all(p.is_meta for p in adapter.parameters.values())


@pytest.mark.parametrize("family", families("t5", "deberta-v2", "mpnet", "falcon"))
def test_families_that_attend_in_their_own_way_are_refused_by_name(family: str) -> None:
    """Kills: a prefix that nothing looks at."""
    loaded = tiny_loaded(family)
    for act in (lambda: PrefixLayer().attach(loaded), lambda: PrefixLayer().check(loaded.config.to_dict())):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"method.kind: {family} attends in a way of its own"):
            act()


def test_a_prefix_needs_its_positions() -> None:
    loaded, adapters = adapters_of("gpt2")
    Policy(loaded)  # type: ignore[arg-type]
    adapters["p"].detach()
    with adapters["k"].route.enter(), pytest.raises(AdapterError, match="positions begin behind a prefix"):
        loaded.model(torch.arange(4)[None])
    with pytest.raises(ConfigError, match="take 97 positions; the model has 96"):
        Policy(loaded, adapters["k"].route).hidden(tiny_batch((93,)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="96 leaves none of the model's 96 positions"):
        PrefixLayer(length=96).check(loaded.config.to_dict())
