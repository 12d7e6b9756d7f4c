"""Encoder-decoders: the loss is transformers' own, row by row, and what is trained is what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_encoders import write_rows
from tiny_models import disturb, one_document, tiny_batch, tiny_loaded
from tiny_t5 import t5_folder
from transformers import AutoTokenizer

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.config import build_config
from tunesmith.data.codec import Codec
from tunesmith.data.encode import encode_row, prompt_ids
from tunesmith.data.rows import Dialogue, Message
from tunesmith.data.templates import open_template
from tunesmith.models.generate import generate
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE
from tunesmith.models.seq2seq import prompts_of
from tunesmith.objectives.sft import SFT
from tunesmith.run import run
from tunesmith.run.api import generate as generate_text

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


def test_writing_reads_the_prompt_with_its_end_as_training_does():
    """Against transformers. Kills: a prompt without its end when writing."""
    loaded = tiny_loaded("t5")
    differ = 0
    for prompt in ([5, 6], [9, 9, 9, 4], [30, 31, 32]):
        wanted, bare = (
            loaded.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 1:].tolist()
            for ids in ([*prompt, END], prompt)
        )
        found = generate(loaded, BASE, [prompt], max_new_tokens=6, stop_ids={END})[0].ids
        assert found == [token for token in wanted if token != END]
        differ += wanted != bare
    assert differ


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5_folder(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("prompt", ["name three colours:", "name three colours: ", "the quick brown fox?"])
@pytest.mark.parametrize("completion", ["Red and blue.", " Red and blue."])
def test_rows_are_tokens_as_transformers_makes_them_of_two_texts(folder, prompt, completion):
    """Kills: an answer that begins in the middle of a word; a prompt with, or an answer without, its end."""
    theirs, codec = AutoTokenizer.from_pretrained(folder), Codec.open(folder)
    row = Dialogue((Message("user", prompt), Message("assistant", completion, supervised=True)), plain=True)
    example = encode_row(row, open_template("auto", codec), codec, 64)
    first = example.supervised.index(True)
    assert [*example.ids[:first], END] == theirs(prompt)["input_ids"]
    assert example.ids[first:] == theirs(completion)["input_ids"]
    assert prompt_ids(row, open_template("auto", codec), codec) == example.ids[:first]


@pytest.mark.slow
def test_a_tiny_t5_is_tuned_and_answers(folder, tmp_path):
    """End to end. Kills: a plan, a run or an exam that takes every model that writes for a decoder."""
    rows = [{"prompt": f"name {word}:", "completion": f"{word} and blue"} for word in ("red", "green", "three", "dog")]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    made = build_config(
        {
            "model": str(folder), "data": {"train": data, "eval": data}, "method": "full",
            "train": {"steps": 120, "rows_per_step": 4, "lr": 0.01}, "precision": {"compute": "fp32"}, "log": [],
            "evaluate": {"metrics": ["exact_match", "loss", "rougeL"], "generate": 12}, "out": str(tmp_path / "run"),
        }
    )  # fmt: skip
    done = run(made)
    assert json.loads((done / "plan.json").read_text())["activations"] == "traced"
    models = json.loads((done / "eval.json").read_text())["models"]
    tuned = models[-1]["metrics"]
    assert tuned["exact_match"]["value"] == 100.0
    assert tuned["loss"]["value"] < 0.5 < models[0]["metrics"]["loss"]["value"]
    [answer] = generate_text(done, "name green:", max_tokens=12)
    assert answer == "green and blue"
