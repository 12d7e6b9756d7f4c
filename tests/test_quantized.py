"""Frozen bases of few bits: the published codes, the same arithmetic as their numbers, never numbers at rest."""

from __future__ import annotations

import pytest
import torch
from conformance import CASES
from safetensors.torch import load_file, save_file
from tiny_folders import tiny_folder
from tiny_models import answers, disturb, families, tiny_batch, tiny_loaded
from torch import nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.merge import merge, unmerge
from tunesmith.adapt.methods import METHODS
from tunesmith.adapt.store import load_adapter
from tunesmith.core.errors import AdapterError, ConfigError, ModelError
from tunesmith.kernels import codes
from tunesmith.kernels.quantized import Quantized, quantize
from tunesmith.models.load import load, meta
from tunesmith.models.policy import Policy
from tunesmith.models.quantize import hold_as_codes, quantisable
from tunesmith.objectives.sft import SFT
from tunesmith.train.held import storage_bytes

KINDS = ("bf16", "int8", "nf4")
FAMILIES = ("llama", "gpt2", "gemma2", "phi3", "bert", "t5")


def weight(rows=48, width=80, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def held(loaded):
    return {name: value for name, value in loaded.model.named_parameters() if isinstance(value, Quantized)}


def quantised(kind, family="llama", dtype=torch.float32, **changes):
    """A tiny model with codes, and the same with their numbers."""
    pair = [tiny_loaded(family, dtype=dtype, **changes) for _ in range(2)]
    for loaded in pair:
        hold_as_codes(loaded.model, quantisable(loaded.model), kind, dtype, {})
        loaded.base = kind
    for name, value in held(pair[1]).items():
        owner = pair[1].model.get_submodule(name.removesuffix(".weight"))
        owner._parameters["weight"] = nn.Parameter(value.dense(), requires_grad=False)
    return pair


# the codes


def test_the_table_is_that_of_the_paper():
    """Quantiles of the normal distribution at even steps, eight above zero, seven below, ending at 0.9677."""
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    made = torch.cat([above, below, torch.zeros(1)]).sort().values / above.max()
    assert torch.allclose(codes.NF4.double(), made, rtol=0, atol=3e-7)
    assert len(codes.DYNAMIC[True].unique()) == len(codes.DYNAMIC[False].unique()) == 256


def test_every_number_has_the_nearest_code_of_its_block():
    """Kills: thresholds that are not half-way; halves of a byte exchanged; scales of the wrong block."""
    x = weight(33, 70)  # neither a whole number of blocks nor of bytes of them
    parts = codes.to_nf4(x)
    flat = nn.functional.pad(x.flatten(), (0, -x.numel() % 64)).view(-1, 64).double()
    largest = flat.abs().amax(1, keepdim=True)
    best = (flat / largest).unsqueeze(-1).sub(codes.NF4.double()).abs().argmin(-1).view(-1, 2)
    assert torch.equal(parts["codes"], (best[:, 0] * 16 + best[:, 1]).to(torch.uint8))
    scales = codes.from_dynamic(parts["scales"], parts["steps"], signed=True, block=256) + parts["offset"]
    assert (scales.double() - largest[:, 0]).abs().max() < 0.01 * largest.max()
    found = codes.from_nf4(parts, x.shape, torch.float32)
    expected = codes.NF4[best.flatten()].view(-1, 64) * scales[:, None]
    assert torch.equal(found, expected.flatten()[: x.numel()].view(x.shape))


def test_int8_is_half_a_step_away_at_most():
    x = weight()
    found = codes.from_int8(codes.to_int8(x), x.shape, torch.float32)
    assert ((found - x).abs() <= x.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()


def test_dynamic_codes_are_the_nearest_ones():
    for signed in (True, False):
        x = weight(1, 1000) if signed else weight(1, 1000).square()
        found, scales = codes.to_dynamic(x, signed=signed, block=256)
        parts = nn.functional.pad(x.flatten(), (0, 24)).view(-1, 256).double() / scales[:, None]
        best = parts.flatten()[:1000, None].sub(codes.DYNAMIC[signed].double()).abs().argmin(1)
        assert torch.equal(found, best.to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 80), (3, 7), (64, 64)])
def test_the_kernels_are_their_plain_twins_bit_for_bit(dtype, shape):
    x = weight(*shape)
    parts = codes.to_nf4(x)
    scales = codes.from_dynamic(parts["scales"], parts["steps"], signed=True, block=256) + parts["offset"]
    twin = codes.plain_nf4(parts["codes"], scales, x.shape, dtype)
    assert torch.equal(codes.from_nf4(parts, x.shape, dtype), twin)
    parts = codes.to_int8(x)
    assert torch.equal(codes.from_int8(parts, x.shape, dtype), codes.plain_int8(*parts.values(), dtype))


def test_nf4_codes_are_those_of_bitsandbytes():
    """Its 8-bit codes of scales are not always the nearest ones: up to 1 in 100 is the neighbour of ours."""
    other = pytest.importorskip("bitsandbytes.functional")
    x = weight(576, 640)
    packed, state = other.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = codes.to_nf4(x)
    assert torch.equal(packed.flatten(), parts["codes"])
    assert torch.equal(state.state2.absmax, parts["steps"])
    assert torch.equal(state.state2.code, codes.DYNAMIC[True])
    apart = (state.absmax.int() - parts["scales"].int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.01


def test_a_block_of_zeros_stays_zero():
    for kind in ("int8", "nf4"):
        assert torch.equal(quantize(torch.zeros(4, 64), kind, torch.float32).dense(), torch.zeros(4, 64))


# the tensor


@pytest.mark.parametrize("kind", KINDS)
def test_codes_cannot_be_written_and_what_is_made_of_them_is_ordinary(kind):
    held = nn.Parameter(quantize(weight(), kind, torch.float32), requires_grad=False)
    assert isinstance(held, Quantized)
    for made in (held.clone(), held.T, held + 1, held.double()):
        assert type(made) is torch.Tensor
    with pytest.raises(TypeError, match="which is frozen"):
        held.mul_(2)


def test_the_backward_keeps_codes_and_not_numbers():
    """Kills: a dense copy of every weight that lives until the backward."""
    from tunesmith.plan.trace import LiveStorages

    layers = [nn.Linear(256, 256, bias=False) for _ in range(8)]
    for layer in layers:
        layer.weight = nn.Parameter(quantize(weight(256, 256), "nf4", torch.float32), requires_grad=False)
    x = torch.randn(2, 256, requires_grad=True)
    with LiveStorages() as live:
        y = x
        for layer in layers:
            y = layer(y)
        kept = live.now_bytes
        y.sum().backward()
    one = 256 * 256 * 4
    assert kept < one / 2
    assert live.peak_bytes < 2 * one


@pytest.mark.parametrize("family", families(*FAMILIES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_codes_says_what_one_of_their_numbers_says(kind, family):
    coded, plain = quantised(kind, family)
    assert held(coded)
    assert torch.allclose(answers(coded), answers(plain), atol=1e-5)
    original = answers(tiny_loaded(family))
    assert not torch.equal(answers(coded), original)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_method_learns_on_codes_as_on_their_numbers(case, family):
    """Kills: gradients that stop at a weight of codes, methods that read bytes where numbers are."""
    method, settings = CASES[case]
    found = []
    for loaded in quantised("nf4", family):
        try:
            adapter = METHODS.load(method)(**settings).attach(loaded, seed=1)
        except (AdapterError, ConfigError) as error:
            found.append(str(error))
            continue
        disturb(adapter)
        policy = Policy(loaded, adapter.route).train(True)
        torch.manual_seed(0)
        SFT().loss(policy, tiny_batch()).total.backward()
        found.append([value.grad for value in adapter.parameters.values()])
    if isinstance(found[0], str):
        assert "frozen" in found[0] or found[0] == found[1]
        return
    assert not held(loaded)
    for mine, other in zip(*found, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or (mine - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_full_tuning_is_refused_on_codes():
    loaded = quantised("nf4")[0]
    with pytest.raises(AdapterError, match="full trains every weight; nf4 is for weights that are frozen"):
        METHODS.load("full")().attach(loaded)
    from tunesmith.config import build_config

    whole = {"method": "full", "precision": {"base": "nf4"}}
    with pytest.raises(ConfigError, match="nf4 holds frozen weights, and method full trains them all"):
        build_config({"model": "x", "data": {"train": "y"}, "train": {"steps": 1}, "out": "z"} | whole)


# merging


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_into_the_numbers_of_the_codes_is_unmerged(kind, dtype):
    """Kills: merging into the weights as they were before they were codes."""
    loaded = quantised(kind, dtype=dtype)[0]
    said = answers(loaded)
    adapter: Adapter = LoRA(targets=("q", "v", "gate", "down")).attach(loaded, seed=1)
    disturb(adapter)
    with adapter.route.enter():
        apart = answers(loaded)
    merge(loaded, "default")
    with adapter.route.enter():
        error = (answers(loaded) - apart).norm() / apart.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    unmerge(loaded)
    adapter.detach()
    assert torch.equal(answers(loaded), said)


# files


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_folder_is_read_into_codes_of_the_file_s_own_numbers(tmp_path, kind, family, stored):
    tiny_folder(tmp_path, family, dtype=stored)
    exact = dict(load(tmp_path, dtype="bf16" if stored == torch.bfloat16 else "fp32").model.named_parameters())
    loaded = load(tmp_path, dtype="fp16", base=kind)
    wanted = quantisable(loaded.model)
    assert wanted
    for name, value in loaded.model.named_parameters():
        if name in wanted:
            assert torch.equal(value.dense(), quantize(exact[name].float(), kind, torch.float16).dense())
        else:
            assert value.dtype == torch.float16
            assert torch.equal(value, exact[name].half())
    assert loaded.model.get_output_embeddings() is None or "lm_head.weight" not in wanted


def test_quantised_weights_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Kills: a whole model of numbers on the way to its codes. Tensors made by loading are counted."""
    from tunesmith.plan.trace import LiveStorages

    tiny_folder(tmp_path, hidden_size=128, intermediate_size=256, num_hidden_layers=6, vocab_size=400)
    load(tmp_path, dtype="bf16", base="nf4")  # what is imported on first use is there

    class Held(LiveStorages):
        def _hold(self, tensor):
            if not tensor.is_meta:
                super()._hold(tensor)

    with Held() as live:
        loaded = load(tmp_path, dtype="bf16", base="nf4")
    linear = sum(value.numel() for value in held(loaded).values())
    rest = sum(value.numel() for value in loaded.model.parameters()) - linear
    assert live.peak_bytes < 2 * linear * 0.6 + 4 * rest + 4 * 128 * 256 * 8


def test_damaged_weights_are_named_as_ever(tmp_path):
    tiny_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"NaN or infinity in the weights: {name}"):
        load(tmp_path, base="nf4")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"missing: {name}"):
        load(tmp_path, base="int8")


def test_an_adapter_remembers_what_its_base_was_held_in(tmp_path):
    from tunesmith.run.opening import open_model

    tiny_folder(tmp_path / "base")
    loaded = load(tmp_path / "base", base="nf4")
    adapter = LoRA().attach(loaded)
    disturb(adapter)
    with adapter.route.enter():
        said = answers(loaded)
    adapter.save(tmp_path / "run")
    opened = open_model(str(tmp_path / "run/adapter"), precision="fp32")
    with opened.route.enter():
        assert torch.equal(answers(opened.loaded), said)
    plain = load(tmp_path / "base")
    load_adapter(plain, tmp_path / "run")
    assert not torch.equal(answers(plain), said)


# the plan


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_codes_and_scales_to_the_byte(tmp_path, kind):
    from tunesmith.plan.memory import count_parameters, tensor_specs

    tiny_folder(tmp_path)
    bare, real = meta(tmp_path, dtype="fp32", base=kind), load(tmp_path, dtype="fp32", base=kind)
    counted = sum(spec.nbytes for spec in tensor_specs(bare.model))
    tensors = list(real.model.parameters()) + list(real.model.buffers())
    parts = [part for one in tensors for part in (one.parts.values() if isinstance(one, Quantized) else [one])]
    distinct = {part.data_ptr(): part.numel() * part.element_size() for part in parts}
    assert counted == sum(distinct.values())
    assert (
        count_parameters(tensor_specs(bare.model)).total == count_parameters(tensor_specs(load(tmp_path).model)).total
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_traces_what_codes_cost_while_they_are_used(tmp_path, kind):
    """Predicted on meta is measured with data."""
    from tunesmith.plan.trace import measure, trace

    tiny_folder(tmp_path)
    found = []
    for loaded, run in ((meta(tmp_path, base=kind), trace), (load(tmp_path, base=kind), None)):
        adapter = LoRA().attach(loaded, seed=0)
        policy = Policy(loaded, adapter.route)
        if run is not None:
            found.append(run(loaded.model, lambda batch, p=policy: SFT().loss(p, batch).total, [9, 7]))
        else:
            from tunesmith.plan.trace import sample_batch

            batch = sample_batch([9, 7])
            found.append(measure(loaded.model, lambda p=policy, b=batch: SFT().loss(p, b).total, 16))
    assert found[0].activations_bytes == pytest.approx(found[1].activations_bytes, rel=0.05)
    assert found[0].flops == found[1].flops


def test_a_merged_export_is_the_unmerged_run_and_requantising_says_what_it_costs(tmp_path, capsys):
    """Kills: an export of the weights that the codes were made from; an error that is not measured."""
    from tunesmith.run.shipping import ship

    tiny_folder(tmp_path / "base")
    loaded = load(tmp_path / "base", base="nf4")
    adapter = LoRA(targets=("q", "v", "down")).attach(loaded)
    disturb(adapter)
    with adapter.route.enter():
        said = answers(loaded)
    adapter.save(tmp_path / "run")
    exported = load(ship(str(tmp_path / "run/adapter"), "merged", str(tmp_path / "merged")))
    assert torch.allclose(answers(exported), said, atol=1e-5)
    assert not torch.allclose(answers(load(tmp_path / "base")), said, atol=1e-2)
    with pytest.raises(ConfigError, match="has no effect with --to gguf"):
        ship(str(tmp_path / "run/adapter"), "gguf", str(tmp_path / "other"), "nf4")

    again = load(ship(str(tmp_path / "run/adapter"), "merged", str(tmp_path / "again"), "nf4"))
    words = capsys.readouterr().err.split()
    told, lost = (float(words[place - 1]) for place, word in enumerate(words) if word == "%")
    pairs = [(again.model.get_parameter(name), exported.model.get_parameter(name)) for name in quantisable(again.model)]
    apart = sum((one - other).square().sum() for one, other in pairs) / sum(other.square().sum() for _, other in pairs)
    assert told == pytest.approx(100 * apart.sqrt().item(), abs=0.01)
    assert 1 < told < 20
    base = dict(load(tmp_path / "base", base="nf4").model.named_parameters())
    changes = [exported.model.get_parameter(name) - base[name].dense() for name in quantisable(again.model)]
    rounding = sum((one - other).square().sum() for one, other in pairs)
    assert lost == pytest.approx(100 * (rounding / sum(one.square().sum() for one in changes)).sqrt().item(), abs=0.6)
    for one, other in pairs:  # what has been rounded has the codes that it was rounded to
        assert torch.equal(codes.to_nf4(one.detach())["codes"], codes.to_nf4(other.detach())["codes"])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bytes_held_by_a_run_are_those_of_codes_and_scales(kind):
    """Kills: asking codes for a storage, which they have none of; counting the numbers that they stand for."""
    loaded, _ = quantised(kind)
    parts = [part for value in held(loaded).values() for part in value.parts.values()]
    ordinary = [value for value in loaded.model.parameters() if not isinstance(value, Quantized)]
    expected = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in (*parts, *ordinary)}
    assert parts
    assert storage_bytes(loaded.model.parameters()) == sum(expected.values())
