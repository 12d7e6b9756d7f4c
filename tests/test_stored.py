"""Masters start from the numbers of the file, not from what they were rounded to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoint_files import save
from safetensors.torch import load_file, save_file
from tiny_folders import tiny_folder
from tiny_training import TinyTuned, run, settings

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.models.load import load
from tunesmith.models.stored import Stored
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection

MASTER = PrecisionSection(compute="bf16")


def masters(loaded, method=None):
    adapter = (method or Full()).attach(loaded, "a", 0)
    return Precision(adapter.parameters, MASTER, Stored(loaded).finer).masters


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_masters_of_a_model_stored_in_fp32_are_the_stored_numbers(tmp_path, family, dtype):
    """Kills: masters made from the rounded weights."""
    exact = dict(load(tiny_folder(tmp_path, family)).model.named_parameters())
    loaded = load(tmp_path, dtype=dtype)
    found = masters(loaded)
    assert found.keys() == exact.keys()
    for name, master in found.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, exact[name]), name
    kept = [name for name in found if loaded.model.get_parameter(name).dtype == torch.float32]
    assert bool(kept) is ((family, dtype) == ("t5", "fp16"))  # what transformers keeps in fp32 is not rounded before


def test_names_that_differ_are_found_as_transformers_finds_them(tmp_path):
    """A bare base model's names, and the norms of old files. Kills: looking for the model's own names alone."""
    exact = dict(load(tiny_folder(tmp_path, "gpt2")).model.named_parameters())
    file = tmp_path / "model.safetensors"
    old = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in old.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    found = masters(load(tmp_path, dtype="bf16"))
    assert all(torch.equal(found[name], value) for name, value in exact.items())

    exact = dict(load(tiny_folder(tmp_path / "bert", "bert")).model.named_parameters())
    file = tmp_path / "bert/model.safetensors"
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, value in load_file(file).items():
        for new, former in norms.items():
            name = name.replace(new, former)
        old[name] = value
    save_file(old, file, {"format": "pt"})
    found = masters(load(tmp_path / "bert", dtype="bf16"))
    assert all(torch.equal(found[name], value) for name, value in exact.items())


def test_a_head_that_a_method_unties_starts_from_the_embedding_of_the_file(tmp_path):
    tiny_folder(tmp_path, tie_word_embeddings=True)
    exact = load(tmp_path).model.get_input_embeddings().weight
    found = masters(load(tmp_path, dtype="bf16"), LoRA(also_train=("head",)))
    assert torch.equal(found["lm_head.weight"], exact)


def test_frozen_tensors_are_not_read(tmp_path, monkeypatch):
    """Kills: a second copy of the model."""
    from tunesmith.models import stored

    loaded = load(tiny_folder(tmp_path), dtype="bf16")
    read = []
    real = stored.safe_open

    def watched(path, framework):
        file = real(path, framework)

        class Watched:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.__exit__(*error)

            def get_tensor(self, name):
                read.append(name)
                return file.get_tensor(name)

        return Watched()

    monkeypatch.setattr(stored, "safe_open", watched)
    found = masters(loaded, TopLayers(layers=1))
    assert sorted(read) == sorted(found)
    assert 0 < len(read) < len(dict(loaded.model.named_parameters()))


def test_weights_that_are_no_longer_the_file_s_are_their_own_start(tmp_path):
    """Kills: trusting the name: a weight that was merged or edited would be trained from its old value."""
    loaded = load(tiny_folder(tmp_path), dtype="bf16")
    name, parameter = next(iter(loaded.model.named_parameters()))
    with torch.no_grad():
        parameter[0, 0] += 1
    found = masters(loaded)
    assert torch.equal(found[name], parameter.float())


def test_what_is_stored_as_it_is_computed_with_is_not_read(tmp_path):
    loaded = load(tiny_folder(tmp_path, dtype=torch.bfloat16), dtype="bf16")
    stored = Stored(loaded)
    assert all(stored.finer(name, held) is None for name, held in loaded.model.named_parameters())


def test_first_small_updates_reach_the_weights_as_often_as_in_fp32(tmp_path):
    """On bf16's grid no update below half a step arrives; from the file's numbers as many do as the step is apart."""
    loaded = load(tiny_folder(tmp_path), dtype="bf16")
    adapter = Full().attach(loaded, "a", 0)
    shares = []
    for stored in (Stored(loaded).finer, lambda name, held: None):
        precision = Precision(adapter.parameters, MASTER, stored)
        before = {name: held.detach().clone() for name, held in adapter.parameters.items()}
        with torch.no_grad():
            for master in precision.masters.values():
                master.mul_(1 + 2.0**-12)
        precision.publish()
        changed = [(held != before[name]).float().mean() for name, held in adapter.parameters.items() if held.dim() > 1]
        shares.append(torch.stack(changed).mean().item())
        with torch.no_grad():
            for name, held in adapter.parameters.items():
                held.copy_(before[name])
        precision.close()
    assert shares[1] == 0
    assert shares[0] > 0.02  # 2^-12 of a number is 1/32 to 1/16 of its step


def test_the_trainer_starts_masters_from_what_is_stored_and_a_resumed_run_from_its_checkpoint(tmp_path):
    """Kills: a trainer that does not ask; a resume that begins at the file's numbers again."""

    def tuned():
        made = TinyTuned(dtype=torch.bfloat16)
        made.stored = lambda name, held: held.float() * (1 + 2.0**-12)
        return made

    def weights(step):
        return load_file(tmp_path / f"checkpoints/step-{step:06d}/weights.safetensors")

    first = tuned()
    start = {name: first.stored(name, held.detach()) for name, held in first.parameters.items()}
    run(tmp_path, settings(steps=1, lr=0.0), tuned=first, precision=MASTER)
    assert all(torch.equal(value, start[name]) for name, value in weights(1).items())
    moved = {name: value + 1 for name, value in weights(1).items()}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    found = checkpoints.load(1)
    moments = load_file(found.path / "moments.safetensors")
    save(checkpoints, replace(found.state, step=2, reason=""), moved, moments)
    run(tmp_path, settings(steps=3, lr=0.0), tuned=tuned(), precision=MASTER, resume=True)
    assert all(torch.equal(value, moved[name]) for name, value in weights(3).items())
