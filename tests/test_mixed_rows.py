"""Rows of one batch with adapters of their own: each gets what it gets alone, in training and in writing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TinyLoaded, disturb, families, one_document, tiny_batch, tiny_loaded
from torch import Tensor

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models import cross_entropy
from tunesmith.models.generate import generate, stream
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE, Route

BATCH = tiny_batch((7, 3, 9, 5, 4))
ROWS = (("a",), (), ("b", "a"), ("b",), ("a",))
MIXED = Route.of_rows(*ROWS)
DECODERS = ["llama", "qwen3", "gemma", "gemma2", "gpt2", "gpt_neox", "phi3", "opt", "falcon"]
ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"]
PROMPTS = [list(range(3 + 5 * row, 3 + 5 * row + length)) for row, length in enumerate((4, 9, 1, 6, 6, 2))]
PROMPT_ROWS = Route.of_rows(("a",), (), ("b", "a"), ("b",), ("a",), ("b",))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda device: 2)


def two_adapters(family: str) -> tuple[TinyLoaded, list[Adapter]]:
    """A model with adapters a, at attention and the embedding (and the head, where there is one), and b, in the MLP."""
    loaded = tiny_loaded(family)
    ends = ("embed", "head") if loaded.family.kind == "decoder" else ("embed",)
    inner = ("q", "v") if "q" in loaded.family.roles else ("query_key_value",)
    adapters = [
        LoRA(rank=2, targets=(*inner, *ends)).attach(loaded, "a"),
        LoRA(rank=3, targets=("up", "down", inner[-1])).attach(loaded, "b"),
    ]
    for number, adapter in enumerate(adapters):
        disturb(adapter, number, 0.3)
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(True)
    return loaded, adapters


def gradients(adapters: list[Adapter]) -> dict[str, Tensor]:
    found = {
        f"{one.name} {name}": p.grad for one in adapters for name, p in one.parameters.items() if p.grad is not None
    }
    for adapter in adapters:
        for parameter in adapter.parameters.values():
            parameter.grad = None
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 2e-6) -> None:
    assert list(found) == list(wanted)
    largest = max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= bound * max(float(value.norm()), largest), name


@pytest.mark.parametrize("family", families(*DECODERS, *ENCODERS))
@pytest.mark.parametrize("packed", [True, False])
def test_states_of_mixed_rows_are_those_of_each_row_alone(family: str, packed: bool) -> None:
    """Kills: an adapter on all rows, on its neighbour's, or in another order than its row says."""
    loaded, _ = two_adapters(family)
    policy = Policy(loaded, packed=packed)  # type: ignore[arg-type]
    with torch.no_grad():
        mixed = policy.under(MIXED).hidden(BATCH)
        alone = [policy.under(Route(names)).hidden(one_document(BATCH, row)) for row, names in enumerate(ROWS)]
        base = policy.hidden(BATCH)
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=0, atol=1e-5)
    changed = (mixed - base).abs().amax(1) > 1e-3
    assert changed.tolist() == [bool(names) for row, names in enumerate(ROWS) for _ in range(BATCH.lengths[row])]


@pytest.mark.parametrize("family", families(*DECODERS))
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_losses_and_gradients_of_mixed_rows_are_those_of_separate_runs(family: str, recompute: str) -> None:
    """Kills: a recomputation without its rows; a head that takes picked states for whole documents."""
    loaded, adapters = two_adapters(family)
    policy = Policy(loaded, MIXED, recompute=recompute)  # type: ignore[arg-type]
    losses = policy.token_losses(BATCH)
    losses.square().sum().backward()
    mixed, apart, total = gradients(adapters), [], torch.zeros(())
    for row, names in enumerate(ROWS):
        found = policy.under(Route(names)).token_losses(one_document(BATCH, row))
        apart.append(found.detach())
        total = total + found.square().sum()
    total.backward()
    torch.testing.assert_close(losses.detach(), torch.cat(apart), rtol=2e-6, atol=5e-6)
    same(mixed, gradients(adapters), 5e-6)
    assert any("lm_head" in name or "embed_out" in name for name in mixed)


@pytest.mark.parametrize("family", families("llama", "gemma2", "gpt2", "falcon"))
def test_logits_of_mixed_rows_are_those_of_each_row_alone(family: str) -> None:
    loaded, _ = two_adapters(family)
    policy = Policy(loaded)  # type: ignore[arg-type]
    index = torch.tensor([18, 2, 8, 27, 0, 11, 22])
    with torch.no_grad():
        found = policy.under(MIXED).logits(BATCH, index)
        starts = torch.tensor(BATCH.lengths).cumsum(0) - torch.tensor(BATCH.lengths)
        for at, logits in zip(index.tolist(), found, strict=True):
            row = int((starts <= at).sum()) - 1
            alone = policy.under(Route(ROWS[row])).logits(one_document(BATCH, row), torch.tensor([at - starts[row]]))
            torch.testing.assert_close(logits, alone[0], rtol=0, atol=1e-5)


def test_an_encoder_decoder_learns_mixed_rows_as_separate_ones() -> None:
    loaded, adapters = two_adapters("t5")
    policy = Policy(loaded, MIXED)  # type: ignore[arg-type]
    losses = policy.token_losses(BATCH)
    losses.sum().backward()
    mixed = gradients(adapters)
    alone = [policy.under(Route(names)).token_losses(one_document(BATCH, row)) for row, names in enumerate(ROWS)]
    torch.cat(alone).sum().backward()
    same(mixed, gradients(adapters), 5e-6)


@pytest.mark.parametrize("family", families(*DECODERS, "t5"))
def test_prompts_with_adapters_of_their_own_are_continued_as_alone(family: str) -> None:
    """Rows that end leave, and the others keep their adapters. Kills: a route that is not narrowed with its rows."""
    loaded, _ = two_adapters(family)
    settings = {"max_new_tokens": 12}
    free = [generate(loaded, Route(PROMPT_ROWS.of(row)), [prompt], stop_ids=set(), **settings)[0].ids  # type: ignore[arg-type]
            for row, prompt in enumerate(PROMPTS)]  # fmt: skip
    stops = {ids[2 * row] for row, ids in enumerate(free[:4])}
    alone = [generate(loaded, Route(PROMPT_ROWS.of(row)), [prompt], stop_ids=stops, **settings)[0]  # type: ignore[arg-type]
             for row, prompt in enumerate(PROMPTS)]  # fmt: skip
    assert any(one.stopped for one in alone)
    assert alone != generate(loaded, BASE, PROMPTS, stop_ids=stops, **settings)  # type: ignore[arg-type]
    for size in (6, 3):
        assert generate(loaded, PROMPT_ROWS, PROMPTS, stop_ids=stops, batch_size=size, **settings) == alone  # type: ignore[arg-type]


def test_a_shared_prefix_of_mixed_rows_is_read_under_each_route() -> None:
    """Kills: keys of the shared prefix computed once, under one row's adapters, for all."""
    loaded, _ = two_adapters("llama")
    shared, settings = [5, 9, 11, 4], {"max_new_tokens": 8, "stop_ids": set[int]()}
    whole = generate(loaded, PROMPT_ROWS, [shared + prompt for prompt in PROMPTS], **settings)  # type: ignore[arg-type]
    assert generate(loaded, PROMPT_ROWS, PROMPTS, shared_prefix=shared, **settings) == whole  # type: ignore[arg-type]
    same_for_all = Route.of_rows(*[("a",)] * len(PROMPTS))
    wanted = generate(loaded, Route(("a",)), PROMPTS, shared_prefix=shared, **settings)  # type: ignore[arg-type]
    assert generate(loaded, same_for_all, PROMPTS, shared_prefix=shared, **settings) == wanted  # type: ignore[arg-type]
    row = Route.of_rows(("b", "a"))
    assert list(stream(loaded, row, PROMPTS[2], **settings)) == list(  # type: ignore[arg-type]
        stream(loaded, Route(("b", "a")), PROMPTS[2], **settings)  # type: ignore[arg-type]
    )


def test_a_route_for_other_rows_is_refused() -> None:
    """Kills: a batch of one more row run under the routes of its neighbours."""
    loaded, _ = two_adapters("llama")
    with pytest.raises(AdapterError, match="the route is for 2 rows, the batch has 5"):
        Policy(loaded, Route.of_rows(("a",), ())).hidden(BATCH)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the route is for 2 rows, there are 6 prompts"):
        generate(loaded, Route.of_rows(("a",), ()), PROMPTS, max_new_tokens=1, stop_ids=set())  # type: ignore[arg-type]
    with Route.of_rows(("a",), ()).enter(), pytest.raises(AdapterError, match="cannot be told apart"):
        loaded.model(torch.arange(9).view(3, 3))
    with Route.of_rows(("a",), ("c",)).enter(), pytest.raises(AdapterError, match="no adapter 'c'"):
        loaded.model(torch.arange(6).view(2, 3))


def test_a_route_of_rows_knows_its_rows() -> None:
    assert MIXED.adapters == ("a", "b")
    assert MIXED.of(2) == ("b", "a")
    assert MIXED.select([3, 1]) == Route.of_rows("b", ())
    assert Route(("a",)).select([3, 1]) == Route(("a",))
    assert Route.of_rows() == BASE
