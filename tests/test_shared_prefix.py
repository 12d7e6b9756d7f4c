"""Beginnings that documents share are computed once, and nobody can tell: losses, gradients, states, scores.

Gradients are compared tensor by tensor, relative to their own norm or to a tenth of the largest, where a tensor's own
gradient is all but zero. In float64 norms are computed in float64 too, which transformers does not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TinyLoaded, disturb, tiny_loaded, with_exact_norms
from torch import Tensor, nn

from tunesmith.adapt.lora import LoRA
from tunesmith.core.problem import Problem
from tunesmith.core.switches import without
from tunesmith.core.types import Batch
from tunesmith.models import cross_entropy, shared
from tunesmith.models.attention import attend
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route, Segments
from tunesmith.models.shared import compacted

pytestmark = pytest.mark.slow

LONG = tuple(range(3, 33))  # a beginning of 30 tokens
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
# windows that reach over every document
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "gemma2": {"sliding_window": 64},
    "mistral": {"sliding_window": 64},
}


def batch_of(documents: Sequence[Sequence[int]], learnt: str = "all") -> Batch:
    """Documents end to end; of each, `all` that can be predicted is supervised, or the last two tokens (`end`)."""
    lengths = tuple(map(len, documents))
    ids = torch.tensor([token for document in documents for token in document])
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = list(accumulate(lengths))
    least = {"all": 99, "end": 2}[learnt]
    sources = [
        place
        for end, length in zip(ends, lengths, strict=True)
        for place in range(max(end - length, end - 1 - least), end - 1)
    ]
    found = torch.tensor(sources, dtype=torch.int64)
    return Batch(ids, positions, lengths, found, ids[found + 1], tuple(f"row:{n}" for n in range(len(lengths))))


def own(seed: int, length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(40, 97, (length,), generator=draw).tolist())


# name -> documents; among them a document that is but the beginning, the same document twice, beginnings in beginnings
CASES: dict[str, list[tuple[int, ...]]] = {
    "one beginning": [LONG + own(seed, 3 + seed) for seed in range(4)],
    "others between": [LONG + own(1, 4), own(2, 9), LONG + own(3, 6), own(4, 2), LONG + own(5, 1)],
    "two beginnings": [LONG + own(1, 4), LONG[::-1] + own(2, 5), LONG + own(3, 2), LONG[::-1] + own(4, 7)],
    "nested": [LONG[:10] + own(1, 5), LONG + own(2, 5), LONG + own(3, 6), LONG[:20] + own(4, 3), LONG + own(3, 9)],
    "identical": [LONG, own(7, 8), LONG, LONG],
    "but the beginning": [LONG + own(1, 6), LONG, LONG + own(2, 6)],
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda device: 4)


def loaded_in(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> TinyLoaded:
    loaded = tiny_loaded(family, dtype=dtype, **(WIDE.get(family, {}) | changes))
    return with_exact_norms(loaded) if dtype == torch.float64 else loaded


def outcome(policy: Policy, batches: Sequence[Batch], saving: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of the sum over some batches."""
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = None
    found = []
    with without(*([] if saving else ["shared_prefix"])):
        for batch in batches:
            torch.manual_seed(0)
            losses = policy.token_losses(batch)
            (losses * torch.linspace(0.5, 1.5, len(losses))).sum().backward()  # no two tokens weigh the same
            found.append(losses.detach())
    return torch.cat(found), {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def check(policy: Policy, batches: Sequence[Batch], bound: float) -> None:
    """That a step is the same with and without sharing."""
    (losses, made), (wanted, gradients) = outcome(policy, batches, True), outcome(policy, batches, False)
    torch.testing.assert_close(losses, wanted, rtol=bound, atol=bound)
    assert list(made) == list(gradients)
    largest = max(float(value.norm()) for value in gradients.values())
    for name, value in gradients.items():
        assert float((made[name] - value).norm()) <= 2 * bound * max(float(value.norm()), 0.1 * largest), name


def computed(policy: Policy, batch: Batch) -> int:
    """Tokens that are run."""
    found = compacted(policy, batch)
    return sum(batch.lengths) if found is None else len(found.tokens)


def lora(loaded: TinyLoaded, name: str = "default", seed: int = 0, **more: Any) -> Route:
    adapter = LoRA(rank=2, targets=("attn", "mlp", "embed"), **more).attach(loaded, name)
    disturb(adapter, seed, 0.3)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(True)
    return adapter.route


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_gradient_of_full_tuning_is_that_of_documents_computed_apart(
    family: str, dtype: torch.dtype, case: str
) -> None:
    """Kills: positions that start again behind the beginning; states of a neighbour; gradients of one member only."""
    policy, batch = Policy(loaded_in(family, dtype)).train(True), batch_of(CASES[case])
    found = compacted(policy, batch)
    assert found is not None
    assert sum(found.segments.lengths) == len(found.tokens) < sum(batch.lengths)
    assert all(found.segments.lengths)
    check(policy, [batch], BOUNDS[dtype])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "gemma2", "mistral", "gpt_neox", "phi3", "opt"])
@pytest.mark.parametrize("learnt", ["all", "end"])
def test_every_gradient_of_an_adapter_is_that_of_documents_computed_apart(family: str, learnt: str) -> None:
    """Kills: attention to the beginning's own rows alone, or to what other documents have behind it."""
    loaded = loaded_in(family, torch.float64)
    policy = Policy(loaded, lora(loaded)).train(True)
    for documents in CASES.values():
        batch = batch_of(documents, learnt)
        assert computed(policy, batch) < sum(batch.lengths)
        check(policy, [batch], 1e-12 if family not in ("gemma2", "phi3", "mistral") else 1e-11)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_recomputed_forward_shares_as_its_first_run_did(family: str, dtype: torch.dtype) -> None:
    """Kills: segments that are gone when the backward runs the blocks again."""
    policy = Policy(loaded_in(family, dtype), recompute="full").train(True)
    for documents in CASES.values():
        check(policy, [batch_of(documents)], BOUNDS[dtype])


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Documents that begin as earlier ones do, or do not."""
    documents: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, 7))):
        begin: tuple[int, ...] = ()
        if documents and draw(st.integers(0, 4)):
            earlier = draw(st.sampled_from(documents))
            begin = earlier[: draw(st.integers(0, len(earlier)))]
        rest = draw(st.lists(st.integers(3, 9), min_size=0 if begin else 1, max_size=24))
        documents.append((*begin, *rest)[:90])
    return documents


@given(documents=trees(), learnt=st.sampled_from(["all", "end"]))
@settings(max_examples=60, deadline=None)
def test_any_tree_of_beginnings_gives_the_losses_and_gradients_of_none(
    documents: list[tuple[int, ...]], learnt: str
) -> None:
    loaded = loaded_in("gpt2", torch.float64, n_layer=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "LEAST_TOKENS", 2)
        patch.setattr(shared, "LEAST_SHARE", 0.0)
        check(Policy(loaded).train(True), [batch_of([*documents, (5, 6, 7)], learnt)], 1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_micro_batches_of_any_number_of_documents_make_the_same_step(rows: int) -> None:
    policy = Policy(loaded_in("gpt2", torch.float64)).train(True)
    documents = CASES["others between"]
    cut = [batch_of(documents[at : at + rows]) for at in range(0, len(documents), rows)]
    trained = outcome(policy, [batch_of(documents)], False)
    losses, _ = outcome(policy, cut, True)
    torch.testing.assert_close(losses, trained[0], rtol=1e-12, atol=1e-12)
    check(policy, cut, 1e-12)


@pytest.fixture(params=["llama", "gpt2"])
def policies(request: pytest.FixtureRequest) -> Policy:
    loaded = loaded_in(request.param)
    return Policy(loaded, lora(loaded))


@pytest.mark.parametrize("case", CASES)
def test_states_and_logits_are_the_callers_tokens_own(policies: Policy, case: str) -> None:
    """Kills: states in the order in which they were computed; the beginning's last token taken for a document's."""
    batch = batch_of(CASES[case])
    some = torch.tensor([len(batch.ids) - 1, 0, 3, batch.lengths[0], 3])
    with torch.no_grad():
        found = policies.hidden(batch), policies.hidden(batch, some), policies.logits(batch, some)
        with without("shared_prefix"):
            wanted = policies.hidden(batch), policies.hidden(batch, some), policies.logits(batch, some)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_scores_of_documents_are_their_own() -> None:
    loaded = loaded_in("llama")
    loaded.predicts = Problem("classification", ("no", "yes"))
    adapter = LoRA(rank=2, targets=("attn",)).attach(loaded, "default")
    disturb(adapter, 0, 0.3)
    policy, batch = Policy(loaded, adapter.route), batch_of(CASES["nested"])
    assert computed(policy, batch) < sum(batch.lengths)
    with torch.no_grad():
        found = policy.scores(batch)
        with without("shared_prefix"):
            torch.testing.assert_close(found, policy.scores(batch), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_with_other_adapters_share_nothing_and_those_with_the_same_do(family: str) -> None:
    """Kills: groups over rows of different routes; segments that act under the route of a row with their number."""
    loaded = loaded_in(family, torch.float64)
    lora(loaded, "a", 0)
    lora(loaded, "b", 1)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("inserts" in name)
    documents = [own(9, 5), *(LONG + own(seed, 2 + seed) for seed in range(6))]
    route = Route.of_rows((), ("a",), ("b",), ("a",), (), ("b", "a"), ("b",))
    policy, batch = Policy(loaded, route).train(True), batch_of(documents)
    found = compacted(policy, batch)
    assert found is not None
    assert len(found.tokens) == sum(batch.lengths) - 60
    check(policy, [batch], 1e-12)


def test_what_many_documents_want_of_one_state_is_added_up_exactly() -> None:
    """Kills: plain indexing on a CPU, whose backward adds up in bfloat16 and ends at 256."""
    states = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.tensor([1] * 300 + [0])
    places = shared.Compact(torch.arange(2), wanted, Segments((2,)), (0,))
    places.states(lambda _: states, None).sum().backward()
    assert states.grad is not None
    assert states.grad[:, 0].tolist() == [1, 300]


def test_half_precision_errs_no_more_than_without_sharing() -> None:
    errors = {True: 0.0, False: 0.0}
    for seed in range(6):
        exact = Policy(tiny_loaded("llama", seed=seed)).train(True)
        narrow = Policy(tiny_loaded("llama", seed=seed, dtype=torch.bfloat16)).train(True)
        with torch.no_grad():
            for one, other in zip(exact.model.parameters(), narrow.model.parameters(), strict=True):
                one.copy_(other.float())
        batch = batch_of([LONG + own(seed + 10 * number, 6) for number in range(12)])
        wanted = outcome(exact, [batch], False)[1]
        for saving in errors:
            made = outcome(narrow, [batch], saving)[1]
            errors[saving] += sum(float((made[n].float() - g).norm() / g.norm()) for n, g in wanted.items())
    assert errors[True] <= 1.1 * errors[False]


def test_a_segment_sees_all_of_what_it_goes_on_from_and_nothing_else() -> None:
    """Kills: `spans` one off; a beginning hidden from queries before its length."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=draw).double() for heads in (4, 2, 2))
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    segments = Segments((2, 3, 1, 3), (None, 0, None, 0))
    assert segments.spans == ((0, 2, 0, 0, 0), (2, 5, 2, 0, 2), (5, 6, 5, 0, 0), (6, 9, 6, 0, 2))
    with segments.enter():
        found, _ = attend(module, query, key, value, None)
    for places in ([0, 1, 2, 3, 4], [5], [0, 1, 6, 7, 8]):
        with Segments((len(places),)).enter():
            wanted, _ = attend(module, *(x[:, :, places] for x in (query, key, value)), None)
        torch.testing.assert_close(found[:, places], wanted, rtol=1e-12, atol=1e-12)
