"""What layouts with parts cannot do is refused by name, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_batch, tiny_config

from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError
from tunesmith.data.encode import Example
from tunesmith.data.pack import cut_into
from tunesmith.objectives.dpo import DPO
from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.limits import check_model, refusals
from tunesmith.parallel.stages import idle_share, levelled, spans, wanted

BASE: dict[str, Any] = {"model": "m", "data": {"train": "x", "eval": "y"}, "train": {"steps": 1}, "out": "o"}
TENSOR, PIPELINE, ZERO3 = {"tensor": 2}, {"pipeline": 2}, {"data": 2, "shard": "zero3"}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"data": 2, "pipeline": 2, "shard": "zero3", "schedule": "interleaved"}, "zero3 would gather in vain"),
        ({"micro_batches": 4}, "micro_batches: 4 has no effect"),
        ({"tensor": 2, "schedule": "gpipe"}, "schedule: gpipe has no effect"),
        ({"shard": "zero1"}, "no effect on one process"),
    ],
)
def test_sections_that_fit_nothing_are_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LayoutSection.model_validate(section)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layout": TENSOR, "method": "subspace"}, "method: subspace is not there with tensor"),
        ({"layout": TENSOR | PIPELINE, "method": "prompt"}, "method: prompt is not there with pipeline"),
        ({"layout": TENSOR | PIPELINE, "method": {"kind": "lora", "dora": True}}, "method.dora"),
        ({"layout": PIPELINE, "method": {"kind": "prefix_layer", "reparameterise": True}}, "method.reparameterise"),
        ({"layout": TENSOR, "method": {"kind": "adapter", "style": "parallel"}}, "method.style"),
        ({"layout": TENSOR, "method": {"kind": "lora", "dropout": 0.1}}, "method.dropout"),
        ({"layout": TENSOR, "train": {"steps": 1, "recompute": "full"}}, "train.recompute"),
        ({"layout": PIPELINE, "data": {"train": "x", "packing": False}}, "data.packing"),
        ({"layout": PIPELINE, "train": {"steps": 1, "cache_trunk": 9}}, "train.cache_trunk"),
        ({"layout": TENSOR, "train": {"steps": 1, "optimizer_state": "int8"}}, "tensor cuts between them"),
        ({"layout": PIPELINE | ZERO3, "precision": {"base": "nf4"}}, "zero3 splits numbers"),
        (
            {
                "layout": PIPELINE,
                "train": {"steps": 1, "stop": {"metric": "bleu"}},
                "evaluate": {"metrics": ["bleu"], "every": 1},
            },
            "no whole model to write with",
        ),
    ],
)
def test_what_was_not_shown_to_be_exact_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config(BASE | change)


def test_an_objective_that_was_not_shown_to_be_exact_is_refused() -> None:
    config = build_config(BASE | {"layout": PIPELINE})
    assert not list(refusals(config))
    another = config.model_copy(update={"objective": DPO()})
    assert [key for key, _, _ in refusals(another)] == ["objective"]


@pytest.mark.parametrize(
    ("layout", "family", "changes", "said"),
    [
        ({"tensor": 3}, "llama", {}, "4 heads cannot be cut into 3"),
        ({"tensor": 4}, "llama", {}, "2 heads of keys and values cannot be cut into 4"),
        ({"tensor": 2}, "llama", {"intermediate_size": 47}, "47 inner features"),
        ({"tensor": 2}, "llama", {"attention_bias": True}, "attention_bias"),
        ({"tensor": 2}, "llama", {"attention_dropout": 0.1}, "drops 0.1"),
        ({"tensor": 2}, "phi3", {}, "how to cut phi3 is not known"),
        ({"pipeline": 2}, "gpt2", {}, "how to cut gpt2 is not known"),
        ({"tensor": 3, "pipeline": 2}, "llama", {}, "4 heads cannot be cut into 3"),
        ({"pipeline": 3}, "llama", {}, "3 parts of 2 blocks"),
        ({"pipeline": 2, "schedule": "interleaved"}, "llama", {}, "4 parts of 2 blocks"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    layout: dict[str, Any], family: str, changes: dict[str, Any], said: str
) -> None:
    """Kills: heads that are cut in two; an MLP in parts of different sizes."""
    with pytest.raises(ConfigError, match=said):
        check_model(LayoutSection.model_validate(layout), tiny_config(family, **changes).to_dict())
    check_model(LayoutSection(tensor=2), tiny_config("llama").to_dict())


def test_the_hint_names_what_divides_all_sizes() -> None:
    with pytest.raises(ConfigError) as raised:
        check_model(LayoutSection(tensor=3), tiny_config("llama").to_dict())
    assert raised.value.hint == "the model can be cut into 2"


def test_stages_have_every_block_once_and_differ_by_one() -> None:
    for blocks in range(2, 9):
        for stages in range(1, blocks + 1):
            held = [(span.first, blocks if span.last is None else span.last) for span in spans(blocks, stages)]
            assert [block for first, last in held for block in range(first, last)] == list(range(blocks))
            assert max(last - first for first, last in held) - min(last - first for first, last in held) <= 1


def test_levelled_micro_batches_are_equally_long_and_teach_what_they_did() -> None:
    """Kills: filling with a document so long that attention over it costs more than the batch."""
    batches = [tiny_batch((7, 3)), tiny_batch((9, 4, 11))]
    found = levelled(batches, 3)
    assert {batch.ids.numel() for batch in found} == {24}
    for before, after in zip(batches, found, strict=False):
        assert torch.equal(before.targets, after.targets)
        assert torch.equal(before.sources, after.sources)
        assert sum(after.lengths) == 24
        assert max(after.lengths) == max(before.lengths)
        assert len(after.rows) == len(after.lengths)
    assert torch.equal(found[2].targets, found[0].targets)  # stands in for one that is missing


def test_rounds_of_an_interleaved_pipeline_are_full_and_its_bound_is_that_of_the_paper() -> None:
    interleaved = LayoutSection(pipeline=4, schedule="interleaved")
    assert [wanted(count, interleaved) for count in (1, 3, 4, 9, 10, 11)] == [1, 3, 4, 10, 10, 12]
    assert wanted(11, LayoutSection(pipeline=4)) == 11
    assert idle_share(LayoutSection(pipeline=4, schedule="gpipe"), 8) == 3 / 11
    assert idle_share(interleaved, 8) == 3 / 19


def test_a_step_is_cut_into_so_many_even_parts() -> None:
    """Kills: more parts than asked; a part that is left with all the long rows."""
    rows = [Example([row] * length, [True] * length, "", 0) for row, length in enumerate((9, 1, 8, 2, 7, 3, 6, 4))]
    for count in (1, 2, 3, 8, 20):
        found = cut_into(rows, count)
        assert len(found) <= count
        assert sorted(len(row.ids) for part in found for row in part) == sorted(len(row.ids) for row in rows)
    assert [sum(len(row.ids) for row in part) for part in cut_into(rows, 2)] == [20, 20]
    assert cut_into([], 3) == []
