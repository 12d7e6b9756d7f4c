"""The tokenizer of a folder, read without transformers, gives the ids that transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_templates import FAMILIES
from tiny import SENTENCES, tiny_tokenizer_folder
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tunesmith.core.errors import ModelError
from tunesmith.data.codec import Answer, Codec, Rendered
from tunesmith.data.rows import Message
from tunesmith.data.templates import open_template, render

TURNS = (
    ("user", "Name three colours, please: <b>bold</b>  two  spaces\n\tand a tab."),
    ("assistant", "Red, green\nand blue."),
    ("user", "What is the capital of France? 1984"),
    ("assistant", "Paris é 你好 🙂."),
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
PIECES = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
PIECES += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"


def like_sentencepiece(step: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if step == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=step, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def save(tokenizer: Tokenizer, folder: Path, template: str = PIECES, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def compare(folder: Path, turns: tuple[tuple[str, str], ...] = TURNS) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    codec = Codec.open(folder)
    template = open_template("auto", codec)
    for count in range(1, len(turns) + 1):
        listed = [{"role": role, "content": text} for role, text in turns[:count]]
        messages = [Message(role, text, role == "assistant") for role, text in turns[:count]]
        generate = count % 2 == 1
        expected = theirs.apply_chat_template(listed, add_generation_prompt=generate)["input_ids"]
        ids, _ = codec.encode(render(messages, template, generate=generate))
        assert ids == expected
        assert codec.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for _, text in turns:
        assert codec.encode_text(text) == theirs(text, add_special_tokens=False)["input_ids"]
        begins = theirs(text)["input_ids"]
        assert codec.adds_bos == (begins[:1] == [codec.bos])


# meant to differ: llama2 repeats the beginning token, and the prompts of `tagged` lack a header
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama2", "tagged")])
def test_chat_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Kills: encoding pieces where the tokenizer would merge them; losing white space around control tokens."""
    compare(FAMILIES[name].folder(tmp_path))


@pytest.mark.parametrize("step", ["first", "always", "never", "prepend"])
def test_sentencepiece_spaces_are_those_of_transformers(step: str, tmp_path: Path) -> None:
    """Kills: a space before every piece behind a control token, or before none."""
    compare(save(like_sentencepiece(step), tmp_path))


@pytest.mark.parametrize("step", ["first", "always", "never", "prepend"])
def test_an_answer_that_goes_on_in_a_word_gets_no_space(step: str, tmp_path: Path) -> None:
    """Kills: encoding the answer of a merged border as if a text began there."""
    codec = Codec.open(save(like_sentencepiece(step), tmp_path))
    text = "the quick br" + "own fox</s>"
    ids, _ = codec.encode(Rendered(text, (Answer(12, len(text), True),)))
    assert codec.decode(ids) == "the quick brown fox"


def byte_level(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_tokenizer_folder(path, special=SPECIAL, eos="</s>") / "tokenizer.json"))


def swallowing(path: Path) -> Tokenizer:
    tokenizer = byte_level(path)
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] == "<|assistant|>"
        token["lstrip"] = token["content"] == "</s>"
    return Tokenizer.from_str(json.dumps(state))


def spaced(path: Path) -> Tokenizer:
    tokenizer = byte_level(path)
    tokenizer.add_tokens([AddedToken("  ", normalized=False), AddedToken("<b>", normalized=False)])
    return tokenizer


def beginning(path: Path) -> Tokenizer:
    tokenizer = byte_level(path)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def cutting(path: Path) -> Tokenizer:
    tokenizer = byte_level(path)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, swallowing, spaced, beginning, cutting])
def test_odd_tokenizers_agree_with_transformers(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    """Kills: ignoring lstrip/rstrip; taking runs of spaces or markup for control tokens; leaving truncation on."""
    compare(save(make(tmp_path / "first"), tmp_path / "second"))


def test_thoughts_are_structure_and_kept_when_decoding(tmp_path: Path) -> None:
    """Kills: dropping added tokens that are not special from decoded text; reading them in user text."""
    codec = FAMILIES["qwen3"].codec(tmp_path)
    thought = codec.token_id("<think>")
    assert thought is not None
    assert codec.decode([thought, codec.eos or 0]) == "<think>"
    assert thought not in codec.encode_text("a <think> b")


def test_stop_ids_join_those_of_the_generation_config(tmp_path: Path) -> None:
    """Kills: stopping at the tokenizer's end token only."""
    folder = FAMILIES["llama3"].folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    codec = Codec.open(folder)
    assert codec.stop_ids == {1, 4, codec.eos}
    assert codec.token_id("<|eot_id|>") in open_template("auto", codec).stop_ids


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json: not a readable tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json: not a readable tokenizer"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: holds no JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
    ],
)
def test_a_damaged_folder_names_its_file(name: str, content: str | None, problem: str, tmp_path: Path) -> None:
    """Kills: a traceback, or an error without the file."""
    folder = tiny_tokenizer_folder(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=problem):
        Codec.open(folder)


def test_templates_by_name_take_the_default(tmp_path: Path) -> None:
    """Kills: failing on the list form of chat_template, or taking the first entry."""
    folder = save(byte_level(tmp_path / "first"), tmp_path / "second")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PIECES}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Codec.open(folder).chat_template == PIECES
    (folder / "chat_template.jinja").write_text("from the file")
    assert Codec.open(folder).chat_template == "from the file"


def test_encoding_imports_neither_torch_nor_transformers() -> None:
    """Kills: an import of torch anywhere on the way to `tunesmith check`."""
    code = (
        "import sys, tunesmith.data.encode, tunesmith.data.templates, tunesmith.data.dataset;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


REAL_TURNS = (
    ("user", "What is 3 * 127?  Use digits: 1234567890.\n\n\tThanks"),
    ("assistant", "It is 381.\n\n- three hundred\n- eighty-one"),
    ("user", "Et en français, 你好? 🙂 don't  worry"),
    ("assistant", " Trois cent quatre-vingt-un. "),
)


@pytest.mark.real
def test_the_bundled_model_gets_the_ids_of_transformers() -> None:
    """Kills: any step of the real pipeline left out; digits that do not split."""
    from tunesmith.models.source import resolve

    folder = resolve("smollm2-135m")
    compare(folder, REAL_TURNS)
    codec = Codec.open(folder)
    assert len(codec.encode_text("1984")) == 4
    assert codec.stop_ids == {codec.eos}
