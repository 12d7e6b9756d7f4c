"""Merged folders: plain transformers loads them with equal logits, tokenizer and template included."""

import shutil

import pytest
import torch
from tiny_folders import tiny_folder
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from tunesmith.core.errors import ConfigError
from tunesmith.export.gguf import save_gguf
from tunesmith.export.merged import save_merged
from tunesmith.models.folder import fingerprint, validate_folder, weight_files
from tunesmith.models.load import load
from tunesmith.models.save import write_model

IDS = torch.tensor([[3, 17, 5, 250, 90, 4]])
CLASSES = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def outputs(model, family):
    more = {"decoder_input_ids": IDS} if family == "t5" else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more)[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_changed_model_saves_and_loads_in_plain_transformers_with_equal_outputs(tmp_path, family, dtype):
    """Kills: saving the weights of the source folder, another dtype, or our attention in the config."""
    loaded = load(tiny_folder(tmp_path / "base", family), dtype=dtype)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.01)
    folder = save_merged(loaded, tmp_path / "merged")
    again = CLASSES.get(family, AutoModelForCausalLM).from_pretrained(folder, dtype="auto").eval()
    assert {parameter.dtype for parameter in again.parameters()} == {next(loaded.model.parameters()).dtype}
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.allclose(outputs(again, family).float(), outputs(loaded.model, family).float(), atol=1e-5)
    assert again.config._attn_implementation != "tunesmith"
    validate_folder(folder)


def test_tokenizer_and_template_come_along(tmp_path):
    loaded = load(tiny_folder(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(save_merged(loaded, tmp_path / "merged"))
    turns = [{"role": "user", "content": "name 3 colours"}]
    assert tokenizer("the 12 foxes")["input_ids"] == loaded.tokenizer("the 12 foxes")["input_ids"]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == loaded.tokenizer.apply_chat_template(
        turns, tokenize=False
    )


@pytest.mark.usefixtures("own_cache")
def test_a_head_that_is_no_longer_the_embedding_stays_apart(tmp_path):
    """Kills: a config that still says tied, so that loading overwrites the trained head."""
    loaded = load(tiny_folder(tmp_path / "base", tie_word_embeddings=True))
    head = torch.nn.Parameter(loaded.model.lm_head.weight.detach() + 1)
    loaded.model.lm_head.weight = head
    again = load(save_merged(loaded, tmp_path / "merged"))
    assert torch.equal(again.model.lm_head.weight, head)
    assert torch.equal(again.model.model.embed_tokens.weight, loaded.model.model.embed_tokens.weight)
    gguf = load(save_gguf(loaded, tmp_path / "model.gguf", dtype="f32"))
    assert torch.equal(gguf.model.lm_head.weight, head)


def test_adapters_that_are_attached_leave_no_trace(tmp_path):
    """Kills: saving the state dict with the inserts in it."""
    from tunesmith.adapt.lora import LoRA

    loaded = load(tiny_folder(tmp_path / "base"))
    LoRA(rank=2).attach(loaded)
    assert fingerprint(save_merged(loaded, tmp_path / "merged")) == fingerprint(tmp_path / "base")
    save_gguf(loaded, tmp_path / "model.gguf")


@pytest.mark.usefixtures("own_cache")
def test_biases_that_the_base_has_not_are_exported(tmp_path, caplog):
    """Kills: a config without the switch, or a file whose reader drops biases and nobody says so."""
    from tunesmith.adapt.bitfit import BitFit
    from tunesmith.adapt.merge import merge

    loaded = load(tiny_folder(tmp_path / "base"))
    adapter = BitFit().attach(loaded)
    with torch.no_grad():
        for value in adapter.parameters.values():
            value.normal_(std=0.3)
    acting = outputs(loaded.model, "llama")
    merge(loaded, adapter.name)
    folder = save_merged(loaded, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (plain.config.attention_bias, plain.config.mlp_bias) == (True, True)
    for model in (plain, load(folder).model, load(save_gguf(loaded, tmp_path / "model.gguf", dtype="f32")).model):
        torch.testing.assert_close(outputs(model, "llama"), acting, rtol=0, atol=1e-5)
    assert "transformers leaves them out" in caplog.text


def test_saving_says_nothing_of_its_own(tmp_path, capfd):
    """Kills: transformers' bar of shards between our lines."""
    loaded = load(tiny_folder(tmp_path / "base", "llama"))
    logging.enable_progress_bar()
    capfd.readouterr()
    write_model(loaded, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_shards_are_written_when_asked_for(tmp_path):
    loaded = load(tiny_folder(tmp_path / "base"))
    folder = save_merged(loaded, tmp_path / "merged", shard_bytes=20_000)
    assert len(weight_files(folder)) > 2
    assert fingerprint(folder) == fingerprint(tmp_path / "base")


def test_exports_replace_nothing_and_leave_nothing_when_they_fail(tmp_path, monkeypatch):
    """Kills: writing into a folder that is in use, or leaving half an export behind."""
    loaded = load(tiny_folder(tmp_path / "base"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        save_merged(loaded, tmp_path / "there")
    with pytest.raises(ConfigError, match="exists already"):
        save_gguf(loaded, tmp_path / "there" / "mine.gguf")
    assert (tmp_path / "there" / "mine.gguf").read_text() == "mine"

    def full(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr("tunesmith.export.gguf._write_tensors", full)
    with pytest.raises(KeyboardInterrupt):
        save_merged(loaded, tmp_path / "merged")
    with pytest.raises(KeyboardInterrupt):
        save_gguf(loaded, tmp_path / "out" / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "there"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.real
def test_the_bundled_model_survives_both_exports(tmp_path):
    loaded = load("smollm2-135m")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = loaded.model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(save_merged(loaded, tmp_path / "merged"), dtype=torch.float32)
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
        file = save_gguf(loaded, tmp_path / "model.gguf")
        back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        assert (back(ids).logits - expected).abs().max() < 0.05
