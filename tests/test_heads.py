"""Prediction heads: what they see, whose they are, and that neighbours do not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import DECODERS, ENCODERS, TinyLoaded, disturb, one_document, tiny_batch, tiny_loaded
from torch import nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.full import Full
from tunesmith.adapt.linear_probe import LinearProbe
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.store import load_adapter
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.errors import AdapterError, ConfigError, DataError, ModelError
from tunesmith.core.problem import Problem
from tunesmith.models.heads import fill_head, fresh_head, open_head, save_head
from tunesmith.models.policy import Policy
from tunesmith.models.ports import attached_to
from tunesmith.models.route import BASE, Route
from tunesmith.models.scores import scores
from tunesmith.objectives.predict import Predict

THREE = Problem("classification", ("a", "b", "c"))
LENGTHS = (7, 3, 9)


def predicting(family: str, problem: Problem = THREE, **changes: object) -> tuple[TinyLoaded, Adapter]:
    loaded = tiny_loaded(family, **changes)
    loaded.predicts = problem
    adapter = LoRA(rank=2).attach(loaded, seed=1)
    disturb(adapter)
    return loaded, adapter


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2", "gemma2", "t5"])
def test_a_score_does_not_depend_on_its_neighbours(family: str) -> None:
    """Kills: pooling across documents, or over padding."""
    loaded, adapter = predicting(family)
    policy, batch = Policy(loaded, adapter.route), tiny_batch(LENGTHS)
    with torch.no_grad():
        together = policy.scores(batch)
        alone = [policy.scores(one_document(batch, index)) for index in range(3)]
        padded = Policy(loaded, adapter.route, packed=False).scores(batch)
    assert together.shape == (3, 3)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("llama", "last"), ("mpnet", "mean")])
def test_the_head_reads_the_mean_or_the_last_token(family: str, pooling: str) -> None:
    """Kills: the first token pooled; a mean that counts a token twice."""
    loaded, adapter = predicting(family)
    policy, batch = Policy(loaded, adapter.route), tiny_batch(LENGTHS)
    assert adapter.head is not None
    weight, bias = adapter.parameters["predict.weight"], adapter.parameters["predict.bias"]
    with torch.no_grad():
        found = policy.scores(batch)
        for index, part in enumerate(policy.hidden(batch).split(list(LENGTHS))):
            state = part.sum(0) / len(part) if pooling == "mean" else part[-1]
            torch.testing.assert_close(found[index], weight @ state + bias, rtol=1e-5, atol=1e-5)


def test_an_encoder_decoder_reads_the_first_state_of_its_decoder() -> None:
    """Against transformers' own forward. Kills: an encoder state pooled; a start token other than the model's."""
    loaded, adapter = predicting("t5")
    batch = one_document(tiny_batch(LENGTHS), 2)
    with torch.no_grad(), adapter.route.enter():
        output = loaded.model(
            input_ids=batch.ids[None], decoder_input_ids=torch.zeros(1, 1, dtype=torch.long), output_hidden_states=True
        )
        found = Policy(loaded, adapter.route).scores(batch)
    state = output.decoder_hidden_states[-1][0, 0]
    torch.testing.assert_close(found[0], adapter.head(state[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_words_are_scored_where_they_are(family: str) -> None:
    """Kills: scores of the token before the word."""
    loaded, adapter = predicting(family, Problem("tokens", ("x", "y")))
    batch = replace(tiny_batch(LENGTHS), sources=torch.tensor([0, 6, 7, 18]), targets=torch.zeros(4, dtype=torch.long))
    policy = Policy(loaded, adapter.route)
    with torch.no_grad():
        torch.testing.assert_close(policy.scores(batch), adapter.head(policy.hidden(batch)[batch.sources]))


@pytest.mark.parametrize("packed", [True, False])
def test_the_second_text_is_of_another_type(packed: bool) -> None:
    """Against transformers' own forward. Kills: types that do not reach the model, or reach another token."""
    loaded, adapter = predicting("bert")
    batch = replace(tiny_batch(LENGTHS), types=torch.tensor([0, 0, 1, 1, 1, 1, 1] + [0] * 3 + [0] * 5 + [1] * 4))
    start = 0
    with torch.no_grad():
        found = Policy(loaded, adapter.route, packed=packed).scores(batch)
        for index, length in enumerate(LENGTHS):
            ids, types = batch.ids[start : start + length], batch.types[start : start + length]
            start += length
            with adapter.route.enter():
                states = loaded.model(input_ids=ids[None], token_type_ids=types[None]).last_hidden_state[0]
            torch.testing.assert_close(found[index], adapter.head(states.mean(0)[None])[0], rtol=1e-5, atol=1e-5)
        plain = Policy(loaded, adapter.route, packed=packed).scores(replace(batch, types=None))
    assert not torch.allclose(plain[0], found[0])


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_bfloat16_states_are_pooled_and_read_in_float32(family: str) -> None:
    """Kills: a mean or a head in bfloat16."""
    loaded, adapter = predicting(family, dtype=torch.bfloat16)
    policy, batch = Policy(loaded, adapter.route), tiny_batch(LENGTHS)
    with torch.no_grad():
        found = policy.scores(batch)
        assert found.dtype == torch.float32
        if family != "t5":
            parts = [part.float() for part in policy.hidden(batch).split(list(LENGTHS))]
            states = torch.stack([part.mean(0) if family == "bert" else part[-1] for part in parts])
            assert torch.equal(found, adapter.head(states))
    assert adapter.parameters["predict.weight"].dtype == torch.float32


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_objective_is_the_sum_over_documents(family: str) -> None:
    """Kills: a mean; classes shifted by one; half the squared error."""
    loaded, adapter = predicting(family)
    policy, batch = Policy(loaded, adapter.route), replace(tiny_batch(LENGTHS), labels=torch.tensor([2, 0, 1]))
    found = Predict().loss(policy, batch)
    logs = policy.scores(batch).log_softmax(1)
    assert found.weight == 3
    assert found.total.item() == pytest.approx(-(logs[0, 2] + logs[1, 0] + logs[2, 1]).item(), rel=1e-6)
    loaded, adapter = predicting(family, Problem("regression"))
    policy = Policy(loaded, adapter.route)
    values = torch.tensor([0.5, -2.0, 3.0])
    found = Predict(problem="regression").loss(policy, replace(batch, labels=values))
    pairs = zip(policy.scores(batch)[:, 0].tolist(), values.tolist(), strict=True)
    wanted = sum((one - other) ** 2 for one, other in pairs)
    assert found.total.item() == pytest.approx(wanted, rel=1e-6)
    assert policy.scores(batch).shape == (3, 1)


def test_a_batch_without_labels_is_an_error_that_names_its_rows() -> None:
    loaded, adapter = predicting("bert")
    with pytest.raises(DataError, match="row:0"):
        Predict().loss(Policy(loaded, adapter.route), tiny_batch())


@pytest.mark.parametrize("method", [LoRA(rank=2), Full()])
def test_the_head_of_any_method_trains_and_goes_with_it(method: LoRA | Full) -> None:
    """Kills: a head without gradient; one that stays on the model when its adapter is gone."""
    loaded = tiny_loaded("bert")
    loaded.predicts = THREE
    adapter = method.attach(loaded, "mine")
    assert {"predict.weight", "predict.bias"} <= set(adapter.parameters)
    assert not {"predict.weight", "predict.bias"} & set(adapter.changes)
    batch = replace(tiny_batch(LENGTHS), labels=torch.tensor([2, 0, 1]))
    Predict().loss(Policy(loaded, adapter.route), batch).total.backward()
    assert adapter.parameters["predict.weight"].grad.abs().sum() > 0
    assert list(attached_to(loaded.model).heads) == ["mine"]
    if isinstance(method, LoRA):
        adapter.detach()
        assert not attached_to(loaded.model).heads


def test_each_adapter_answers_with_its_own_head() -> None:
    """Kills: the last head for everyone; the base guessing between two."""
    loaded, one = predicting("bert")
    loaded.predicts = Problem("classification", ("no", "yes"), seed=5)
    two = LoRA(rank=2).attach(loaded, "two", seed=2)
    batch = tiny_batch(LENGTHS)
    assert Policy(loaded, one.route).scores(batch).shape == (3, 3)
    assert Policy(loaded, two.route).scores(batch).shape == (3, 2)
    with pytest.raises(AdapterError, match="several heads"):
        Policy(loaded, BASE).scores(batch)
    loaded.predicts = None
    bare = LoRA(rank=2).attach(loaded, "bare")
    assert "predict.weight" not in bare.parameters
    with pytest.raises(AdapterError, match="bare has no prediction head"):
        Policy(loaded, bare.route).scores(batch)


def test_a_fresh_head_depends_on_its_seed_alone() -> None:
    """Kills: a head that the random state of the caller changes."""
    loaded = tiny_loaded("bert")
    torch.rand(3)
    first = fresh_head(loaded, THREE)
    assert torch.equal(first.weight, fresh_head(loaded, THREE).weight)
    assert not torch.equal(first.weight, fresh_head(loaded, replace(THREE, seed=1)).weight)
    assert first.weight.std().item() == pytest.approx(1 / math.sqrt(32), rel=0.3)
    batch = tiny_batch(LENGTHS)
    with torch.no_grad():
        again = scores(Policy(loaded), batch, fresh_head(loaded, THREE))
        assert torch.equal(scores(Policy(loaded), batch, first), again)


def test_a_head_is_saved_and_read_or_refused(tmp_path: Path) -> None:
    loaded, adapter = predicting("bert")
    assert adapter.head is not None
    kept = save_head(adapter.head, tmp_path)
    assert kept == {"problem": "classification", "labels": ["a", "b", "c"], "pooling": "mean"}
    again = fresh_head(loaded, THREE)
    fill_head(again, kept, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter.head.parameters(), strict=True))
    with pytest.raises(Exception, match="misshapen"):
        fill_head(fresh_head(loaded, Problem("regression")), kept, tmp_path)
    with pytest.raises(Exception, match="'last'"):
        fill_head(again, {**kept, "pooling": "last"}, tmp_path)


def test_words_of_an_encoder_decoder_are_refused_by_name() -> None:
    loaded = tiny_loaded("t5")
    loaded.predicts = Problem("tokens", ("x", "y"))
    with pytest.raises(ConfigError, match="t5 is an encoder-decoder"):
        LoRA(rank=2).attach(loaded)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, "t5"])
def test_a_head_fits_every_family_on_the_meta_device(family: str) -> None:
    """Counts are known before weights are. Kills: a width under a name that the table lacks."""
    loaded = tiny_loaded(family)
    loaded.model = loaded.model.to("meta")
    head = fresh_head(loaded, THREE)
    assert head.weight.is_meta
    assert head.weight.shape == (3, 32)
    assert isinstance(head, nn.Module)


@pytest.mark.parametrize("method", [LoRA(rank=2), TopLayers(layers=1)])
def test_an_adapter_takes_its_head_to_the_disk_and_back(method: LoRA | TopLayers, tmp_path: Path) -> None:
    """Kills: a head that is drawn again; one among the adapter's own tensors, where peft would refuse it."""
    loaded = tiny_loaded("bert", tmp_path / "base")
    loaded.config.save_pretrained(tmp_path / "base")
    loaded.predicts = THREE
    adapter = method.attach(loaded)
    disturb(adapter)
    batch = tiny_batch(LENGTHS)
    with torch.no_grad():
        said = Policy(loaded, adapter.route).scores(batch)
    folder = adapter.save(tmp_path / "run")
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "predict.safetensors",
    ]  # fmt: skip
    again = tiny_loaded("bert", tmp_path / "base")
    found = load_adapter(again, folder)
    assert again.predicts is None
    with torch.no_grad():
        assert torch.equal(Policy(again, found.route).scores(batch), said)
    (folder / "predict.safetensors").unlink()
    bare = tiny_loaded("bert", tmp_path / "base")
    with pytest.raises(ModelError, match="prediction head cannot be read"):
        load_adapter(bare, folder)
    assert not attached_to(bare.model).names


def test_a_model_that_was_tuned_whole_keeps_its_head_beside_it(tmp_path: Path) -> None:
    loaded = tiny_loaded("bert", tmp_path / "base")
    loaded.predicts = THREE
    adapter = Full().attach(loaded)
    disturb(adapter)
    folder = adapter.save(tmp_path / "run")
    assert folder.name == "model"
    again = tiny_loaded("bert", folder)
    head = open_head(again, folder)
    assert head is not None
    assert head.problem == THREE
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), adapter.head.parameters(), strict=True))
    assert open_head(again, tmp_path / "base") is None


@pytest.mark.parametrize("kind", ["classification", "tokens"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "llama", "t5"])
def test_rows_of_a_batch_are_answered_by_the_heads_of_their_adapters(family: str, kind: str) -> None:
    """A probe, a LoRA and a second LoRA with another list of labels. Kills: one head for all rows; a neighbour's."""
    if (family, kind) == ("t5", "tokens"):
        return
    loaded = tiny_loaded(family)
    for name, method, labels in (("a", LoRA(rank=2), "xyz"), ("b", LoRA(rank=2), "no"), ("c", LinearProbe(), "pqr")):
        loaded.predicts = Problem(kind, tuple(labels), seed=len(name + labels))  # type: ignore[arg-type]
        disturb(method.attach(loaded, name, seed=ord(name)), seed=ord(name))
    rows, batch = ("b", "c", "a"), tiny_batch(LENGTHS)
    for packed in (True, False):
        with torch.no_grad():
            found = Policy(loaded, Route.of_rows(*rows), packed=packed).scores(batch)
            alone = [Policy(loaded, Route((name,))).scores(one_document(batch, row)) for row, name in enumerate(rows)]
        assert found.shape == (sum(map(len, alone)), 3)
        assert found[: len(alone[0]), 2].isinf().all(), "two labels among rows of three"
        for wanted, part in zip(alone, found.split([len(part) for part in alone]), strict=True):
            torch.testing.assert_close(part[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="several heads"):
        Policy(loaded, Route.of_rows("a", (), "b")).scores(batch)
