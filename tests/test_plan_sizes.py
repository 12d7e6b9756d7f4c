"""Which model of a family fits: published sizes, configs scaled to them, the largest within a memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_models import SMALL, small_config

from tunesmith.config import build_config
from tunesmith.plan.published import PUBLISHED, rungs, scaled
from tunesmith.plan.shape import read_shape
from tunesmith.run import sizing
from tunesmith.run.sizing import _first_that_fails, largest_model, show_largest_model

# as their model cards have them
COUNTS = {
    "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248, "Llama-2-13B": 13_015_864_320, "Llama-2-70B": 68_976_648_192,
    "Llama-3-70B": 70_553_706_496, "Llama-3.1-405B": 405_853_388_800, "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688, "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664, "Qwen2.5-32B": 32_763_876_352, "Qwen2.5-72B": 72_706_203_648,
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "bert-base": 109_482_240, "bert-large": 335_141_888, "roberta-base": 124_645_632, "roberta-large": 355_359_744,
    "MiniLM-L6": 22_713_216,
}  # fmt: skip


def config_of(family: str) -> dict:
    return {"model_type": family, "architectures": ["X"], **SMALL.get(family, SMALL["bert"])}


def vectors(family: str, shape) -> int:
    """Norms, biases, positions and the like, in closed form."""
    width, blocks, keys = shape.d_model, shape.n_layers, shape.n_kv_heads * shape.d_head
    if family in ("llama", "qwen2"):
        biases = blocks * (width + 2 * keys) if family == "qwen2" else 0
        return (2 * blocks + 1) * width + biases
    of_block = 9 * width + shape.d_mlp
    if family == "gpt2":
        return blocks * of_block + 1024 * width + 2 * width
    places = {"bert": 512 + 2, "roberta": 514 + 1}[family]
    return blocks * of_block + (places + 2) * width + width * (width + 1)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(family: str):
    """Kills: a wrong number of blocks, heads of keys, or tokens in the table."""
    for rung in rungs(config_of(family)):
        assert rung.matrix_numbers + vectors(family, rung.shape) == COUNTS[rung.name], rung.name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3_text", "gpt_neox"])
def test_a_scaled_config_says_the_sizes_it_was_scaled_to_and_builds(family: str):
    """Published ones, and those of the rule. Kills: leaving the width of a head; lists of block kinds that stay."""
    import torch
    from transformers import AutoConfig, AutoModel

    settings = small_config(family).to_dict()
    for rung in rungs(settings)[:1]:
        made = scaled(settings, rung.shape)
        assert read_shape(made) == rung.shape
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(**made))
        count = sum(parameter.numel() for parameter in model.parameters())
        untied = 0 if rung.shape.tied else rung.shape.head_parameters  # a head that is not in this model
        assert count == pytest.approx(rung.matrix_numbers - untied, rel=0.1)


def test_sizes_of_the_rule_grow_and_keep_their_proportions():
    found = [rung.shape for rung in rungs(small_config("gpt_neox").to_dict())]
    assert [shape.d_model for shape in found] == sorted({shape.d_model for shape in found})
    assert {shape.d_head for shape in found} == {8}
    assert {round(shape.d_mlp / shape.d_model, 3) for shape in found} == {2.0}


def test_the_largest_is_found_wherever_it_is():
    for count in range(1, 9):
        for fitting in range(count + 1):
            asked: list[int] = []

            def fits(number: int, fitting: int = fitting, asked: list[int] = asked) -> bool:
                asked.append(number)
                return number < fitting

            assert _first_that_fails(fits, count) == fitting
            assert {fitting - 1, fitting} & set(range(count)) <= set(asked)  # both are known, to be shown


@pytest.mark.slow
def test_the_largest_model_fits_and_the_next_does_not_with_no_weights_there(tmp_path: Path, monkeypatch):
    """From config.json alone. Kills: the smallest that fails; a plan of the config as it is."""
    monkeypatch.setattr(sizing, "rungs", lambda settings: rungs(settings)[::16])
    settings = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **SMALL["llama"]}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 1}))
    raw = {"model": str(tmp_path), "data": {"train": "none", "max_length": 64}, "out": str(tmp_path / "run")}
    raw |= {"method": "lora", "train": {"steps": 1, "micro_batch_tokens": 64, "tokens_per_step": 128}}
    room = 492_000_000  # what Python and its libraries take, and little more
    found = largest_model(build_config(raw), room)
    assert found.fits is not None
    assert found.beyond is not None
    assert not found.published
    assert found.fits.needed_bytes <= room < found.beyond.needed_bytes
    assert found.fits.rung.name in show_largest_model(found.as_dict())[0]
