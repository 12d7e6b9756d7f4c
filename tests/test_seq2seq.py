"""Encoder-decoders: the loss is transformers' own, row by row, and what is trained is what is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import disturb, one_document, tiny_batch, tiny_loaded

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.models.generate import generate
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE
from tunesmith.models.seq2seq import prompts_of
from tunesmith.objectives.sft import SFT

LENGTHS = (7, 3, 9, 5)
END = 1


def theirs(loaded, batch):
    """Summed loss of one document from transformers: the encoder hears the prompt and </s>, labels are the rest."""
    ids = batch.ids.tolist()
    learnt = {place + 1 for place in batch.sources.tolist()}
    first = min(learnt)
    labels = [token if place in learnt else -100 for place, token in enumerate(ids)][first:]
    # where all is learnt, transformers' own shift of the labels gives these inputs
    given = {} if -100 not in labels else {"decoder_input_ids": torch.tensor([[0, *ids[first:-1]]])}
    with torch.no_grad():
        found = loaded.model(input_ids=torch.tensor([[*ids[:first], END]]), labels=torch.tensor([labels]), **given)
    return found.loss.item() * len(learnt)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_transformers_row_by_row(tied):
    """Kills: a prompt without its end; targets shifted by one; a head that is not scaled; padding that is heard."""
    loaded = tiny_loaded("t5", tie_word_embeddings=tied)
    batch = tiny_batch(LENGTHS)
    with torch.no_grad():
        losses = Policy(loaded).token_losses(batch)
    owner = torch.searchsorted(torch.tensor(LENGTHS).cumsum(0), batch.sources, right=True)
    for index in range(len(LENGTHS)):
        ours = losses[owner == index].sum().item()
        assert ours == pytest.approx(theirs(loaded, one_document(batch, index)), rel=1e-6)


def test_an_unsupervised_turn_within_the_answer_is_read_and_not_learnt():
    """Kills: everything behind the prompt counted."""
    loaded, batch = tiny_loaded("t5"), tiny_batch((9,))
    keep = torch.tensor([True, True, False, False, True, False, False])
    batch = replace(batch, sources=batch.sources[keep], targets=batch.targets[keep])
    with torch.no_grad():
        losses = Policy(loaded).token_losses(batch)
    assert losses.shape == (3,)
    assert losses.sum().item() == pytest.approx(theirs(loaded, batch), rel=1e-6)


def test_neighbours_do_not_matter():
    """Kills: a mask that lets a short row hear padding."""
    loaded = tiny_loaded("t5")
    adapter = LoRA(rank=2).attach(loaded)
    disturb(adapter)
    policy, batch = Policy(loaded, adapter.route), tiny_batch(LENGTHS)
    with torch.no_grad():
        together = policy.token_losses(batch)
        alone = torch.cat([policy.token_losses(one_document(batch, index)) for index in range(len(LENGTHS))])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_where_an_answer_begins_is_known_or_found():
    """Kills: a document without supervision that takes its neighbour's place."""
    batch = tiny_batch((7, 2, 9))
    assert prompts_of(batch) == (2, 2, 2)
    assert prompts_of(replace(batch, prompts=(3, 1, 4))) == (3, 1, 4)


def test_what_is_trained_is_what_is_written():
    """Taught one answer, it writes that answer. Kills: writing that reads another prompt than training."""
    loaded = tiny_loaded("t5")
    batch = tiny_batch((6,), seed=3)
    ids = torch.cat([batch.ids[:5], torch.tensor([END])])
    batch = replace(batch, ids=ids, targets=ids[batch.sources + 1])
    free = generate(loaded, BASE, [ids[:2].tolist()], max_new_tokens=8, stop_ids={END})[0].ids
    adapter = Full().attach(loaded)
    policy = Policy(loaded, adapter.route)
    optimizer = torch.optim.Adam(adapter.parameters.values(), lr=0.01)
    for _ in range(150):
        loss = SFT().loss(policy, batch).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    prompt, answer = ids[:2].tolist(), ids[2:-1].tolist()
    assert free != answer
    assert generate(loaded, adapter.route, [prompt], max_new_tokens=8, stop_ids={END})[0].ids == answer
