"""Which beginnings are shared, and which documents are left alone: those that are not all treated alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_shared_prefix import CASES, LONG, batch_of, check, loaded_in, lora, own, trees
from tiny_models import ENCODERS, TinyLoaded, tiny_loaded

from tunesmith.adapt.method import Method
from tunesmith.adapt.prefix_layer import PrefixLayer
from tunesmith.adapt.prompt import Prompt
from tunesmith.core.switches import without
from tunesmith.data.pack import Sizes, StepStream
from tunesmith.models import attention, shared
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route
from tunesmith.models.shared import Group, compacted

pytestmark = pytest.mark.slow


@given(documents=trees())
@settings(max_examples=200, deadline=None)
def test_groups_hold_documents_that_begin_alike_and_save_most(documents: list[tuple[int, ...]]) -> None:
    """Kills: a beginning longer than the shortest document; a document in two groups; the short beginning kept."""
    ids = torch.tensor([token for document in documents for token in document])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "LEAST_TOKENS", 1)
        groups = shared.shared(ids, [len(document) for document in documents])
    members = [number for group in groups for number in group.documents]
    assert len(set(members)) == len(members)
    for group in groups:
        assert len({documents[number][: group.length] for number in group.documents}) == 1
        assert all(len(documents[number]) >= group.length for number in group.documents)
    whole = (len(documents) - 1) * _common(documents)
    pairs = [_common((one, other)) for at, one in enumerate(documents) for other in documents[:at]]
    assert sum(group.saved for group in groups) >= max([whole, *pairs])


def _common(documents: Sequence[tuple[int, ...]]) -> int:
    alike = [len(set(column)) == 1 for column in zip(*documents, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def test_a_longer_beginning_of_a_few_wins_where_it_saves_more_than_a_short_one_of_all() -> None:
    """Kills: the first groups found kept, or given up, whatever they save."""
    few = [LONG + own(1, 5), LONG + own(2, 5), LONG + own(3, 5), LONG[:4] + own(4, 20), LONG[:4] + own(5, 20)]
    many = [*few[:2], *(LONG[:25] + own(seed, 5) for seed in range(4))]
    assert _groups(few) == [Group((0, 1, 2), 30)]
    assert _groups([*few, *(LONG[:4] + own(seed, 20) for seed in range(6, 10))]) == [
        Group((0, 1, 2), 30),
        Group((3, 4, 5, 6, 7, 8), 4),
    ]
    assert _groups(many) == [Group((0, 1, 2, 3, 4, 5), 25)]


def _groups(documents: Sequence[tuple[int, ...]]) -> list[Group]:
    return shared.shared(torch.tensor([token for one in documents for token in one]), [len(one) for one in documents])


def test_too_little_is_not_worth_it() -> None:
    policy = Policy(loaded_in("llama"))
    assert compacted(policy, batch_of([LONG[:15] + own(1, 9), LONG[:15] + own(2, 9)])) is None
    assert compacted(policy, batch_of([LONG[:16] + own(1, 9), LONG[:16] + own(2, 9)])) is not None
    many = [own(seed, 60) for seed in range(10)]
    assert compacted(policy, batch_of([*many, LONG[:16] + own(1, 9), LONG[:16] + own(2, 9)])) is None
    assert compacted(policy, batch_of([LONG])) is None


def _dropping(loaded: TinyLoaded, name: str) -> Route:
    return lora(loaded, dropout=0.5) if name == "adapter" else lora(loaded)


@pytest.mark.parametrize(("name", "changes"), [("adapter", {}), ("model", {"attention_dropout": 0.1})])
def test_dropout_that_acts_is_drawn_for_each_document(name: str, changes: dict[str, Any]) -> None:
    """Kills: one mask for all documents of a group; sharing given up where dropout is switched off."""
    loaded = loaded_in("llama", **changes)
    policy, batch = Policy(loaded, _dropping(loaded, name)).train(True), batch_of(CASES["nested"])
    assert compacted(policy, batch) is None
    check(policy, [batch], 1e-6)
    assert compacted(policy.train(False), batch) is not None


def test_a_module_that_drops_is_found_wherever_it_is() -> None:
    loaded = loaded_in("gpt2", resid_pdrop=0.1)
    assert compacted(Policy(loaded).train(True), batch_of(CASES["nested"])) is None


@pytest.mark.parametrize("method", [Prompt(length=3), PrefixLayer(length=3)])
def test_rows_behind_trained_vectors_are_left_alone(method: Method) -> None:
    loaded = loaded_in("llama")
    adapter = method.attach(loaded, "default")
    policy = Policy(loaded, adapter.route).train(True)
    check(policy, [batch_of(CASES["nested"])], 1e-6)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_window_shorter_than_a_document_is_left_alone(family: str) -> None:
    """Kills: a beginning seen from outside the window."""
    policy, batch = Policy(loaded_in(family, sliding_window=33)), batch_of(CASES["nested"])
    assert compacted(policy, batch) is None
    assert compacted(Policy(loaded_in(family, sliding_window=39)), batch) is not None
    check(Policy(loaded_in(family, torch.float64, sliding_window=39)).train(True), [batch], 1e-11)


@pytest.mark.parametrize("family", [name for name in ENCODERS if name in ("bert", "roberta")])
def test_models_that_look_ahead_are_left_alone(family: str) -> None:
    policy, batch = Policy(tiny_loaded(family)), batch_of(CASES["nested"])
    assert compacted(policy, batch) is None


def test_padded_rows_and_models_under_observation_are_left_alone() -> None:
    """Kills: statistics of a module's inputs that count a beginning once."""
    loaded, batch = loaded_in("llama"), batch_of(CASES["nested"])
    assert compacted(Policy(loaded, packed=False), batch) is None
    policy = Policy(loaded)
    with attention.hearing(lambda module, key, value: None):
        assert compacted(policy, batch) is None
    hook = loaded.model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert compacted(policy, batch) is None
    hook.remove()
    loaded.model.model.layers[1].self_attn.is_causal = False
    assert compacted(policy, batch) is None
    loaded.model.model.layers[1].self_attn.is_causal = True
    assert compacted(policy, batch) is not None
    with without("shared_prefix"):
        assert compacted(policy, batch) is None


def test_rows_of_a_step_that_begin_alike_share_a_micro_batch() -> None:
    """Kills: rows cut in the order in which they come."""

    class InOrder:
        def __len__(self) -> int:
            return 6

        def pick(self, epoch: int, position: int) -> tuple[int, int]:
            return 0, position

    class Row:
        def __init__(self, number: int) -> None:
            self.number, self.ids = number, (LONG if number % 2 else LONG[::-1])[: 20 + number]

    sizes = Sizes(rows_per_step=6, micro_batch_rows=3)
    (step,) = StepStream(InOrder(), lambda _, row: Row(row), sizes, epochs=1)  # type: ignore[arg-type]
    assert [[row.number for row in micro] for micro in step.micro_batches] == [[0, 2, 4], [1, 3, 5]]
