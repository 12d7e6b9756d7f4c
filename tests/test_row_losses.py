"""Losses of held-out rows: by token, whatever the batches, and without a trace."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_loaded

from tunesmith.data.encode import Example
from tunesmith.evaluate.bootstrap import interval
from tunesmith.evaluate.losses import row_losses
from tunesmith.evaluate.metrics.losses import Loss
from tunesmith.models.policy import Policy


def rows_of(lengths: tuple[int, ...] = (5, 9, 2, 7, 7, 3), seed: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for place, length in enumerate(lengths):
        ids = torch.randint(3, 97, (length,), generator=draw).tolist()
        found.append(Example(ids, [at >= 1 + place % 2 for at in range(length)], f"rows.jsonl:{place + 1}"))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("packed", [True, False])
def test_losses_do_not_depend_on_batches(family, packed):
    """Kills: a row's loss put down to its neighbour; a mean over batches."""
    policy = Policy(tiny_loaded(family), packed=packed)
    rows = rows_of()
    totals, tokens = row_losses(policy, rows)
    assert tokens == [sum(row.supervised) for row in rows]
    for batch_tokens in (1, 11, 20):
        other, counts = row_losses(policy, rows, batch_tokens=batch_tokens)
        assert other == pytest.approx(totals, rel=1e-5)
        assert counts == tokens


def test_losses_are_those_of_the_model():
    """Kills: a loss of the token itself instead of the one after it."""
    loaded = tiny_loaded("llama")
    rows = rows_of()
    totals, _ = row_losses(Policy(loaded), rows)
    for row, total in zip(rows, totals, strict=True):
        ids = torch.tensor([list(row.ids)])
        chance = torch.log_softmax(loaded.model(input_ids=ids).logits[0].float(), -1)
        learnt = [at for at in range(1, len(row.ids)) if row.supervised[at]]
        assert total == pytest.approx(-sum(chance[at - 1, row.ids[at]].item() for at in learnt), rel=1e-4, abs=1e-6)


def test_measuring_leaves_modes_gradients_and_randomness_alone():
    """Kills: dropout while measuring; a model left in evaluation mode; a graph kept alive."""
    loaded = tiny_loaded("gpt2", resid_pdrop=0.5)
    calm, _ = row_losses(Policy(loaded), rows_of())
    policy = Policy(loaded).train()
    state = torch.get_rng_state()
    totals, _ = row_losses(policy, rows_of())
    assert totals == calm
    assert row_losses(policy, rows_of())[0] == calm
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in loaded.model.modules())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_progress_counts_rows():
    """Kills: progress that never reaches its end."""
    seen: list[tuple[int, int]] = []
    row_losses(Policy(tiny_loaded()), rows_of(), batch_tokens=12, progress=lambda *at: seen.append(at))
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_interval_of_the_loss_is_by_token():
    """Kills: rows that weigh the same whatever their length."""
    totals, tokens = row_losses(Policy(tiny_loaded()), rows_of())
    metric = Loss()
    found = interval(metric, metric.from_losses(totals, tokens))
    assert found.value == pytest.approx(sum(totals) / sum(tokens))
    assert found.low <= found.value <= found.high
