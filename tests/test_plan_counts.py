"""What a model and its training hold, counted: closed forms, the lectures' figures, the state of a real step."""

from __future__ import annotations

import json

import pytest
import torch
from plan_models import SMALL, loss_of, small_config, small_model, with_low_rank

from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.plan.memory import IMPORTS_BYTES, TensorSpec, count_memory, count_parameters, tensor_specs
from tunesmith.plan.shape import lora_parameters, read_shape
from tunesmith.plan.trace import sample_batch


@pytest.mark.parametrize("family", SMALL)
def test_a_model_on_meta_has_the_parameters_of_the_real_one(family: str):
    """Kills: counting named tensors of a tied pair twice."""
    real = small_model(family)
    planned = count_parameters(tensor_specs(small_model(family, device="meta")))
    assert planned.total == sum(parameter.numel() for parameter in real.parameters())
    assert planned.trainable == planned.total


def test_what_is_given_to_the_optimizer_is_what_counts_as_trained():
    """Kills: reading requires_grad although the parameters were named."""
    model = small_model("llama", device="meta")
    norm = model.model.norm.weight
    assert count_parameters(tensor_specs(model, [norm])).trainable == norm.numel()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_closed_form_counts_the_matrices_of_a_real_model(family: str):
    """Kills: giving keys as many heads as queries; forgetting the gate."""
    model = small_model(family, device="meta")
    shape = read_shape(small_config(family).to_dict())
    inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    assert shape.matrix_parameters == inside


@pytest.mark.parametrize("family", SMALL)
def test_every_family_says_its_sizes_under_the_same_names(family: str):
    shape = read_shape(small_config(family).to_dict())
    layers = 3 if family == "llama" else 2
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.d_head) == (layers, 32, 4, 8)
    assert shape.d_mlp == {"llama": 88, "gpt2": 128}.get(family, 64)
    assert shape.vocab == (160 if family == "llama" else 96)


def test_a_config_is_read_from_a_folder_and_its_gaps_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL["llama"]}))
    assert read_shape(tmp_path).d_mlp == 88
    with pytest.raises(ModelError, match="hidden_size"):
        read_shape({"model_type": "llama", "vocab_size": 3, "num_hidden_layers": 1, "num_attention_heads": 1})


GPT3 = {"model_type": "gpt2", "n_embd": 12288, "n_layer": 96, "n_head": 96, "vocab_size": 50257}
GPT2_M = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257}
GPT2_L = {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "vocab_size": 50257}
ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50265,
}
ROBERTA_LARGE = {**ROBERTA, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
DEBERTA_XXL = {**ROBERTA, "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24}


@pytest.mark.parametrize(
    ("config", "rank", "published"),
    [
        (GPT3, 1, 4_718_592),
        (GPT3, 4, 18_874_368),
        (GPT3, 8, 37_748_736),
        (GPT2_M, 4, 393_216),
        (GPT2_L, 4, 737_280),
        (ROBERTA, 8, 294_912),
        (ROBERTA_LARGE, 8, 786_432),
        (DEBERTA_XXL, 16, 4_718_592),
    ],
)
def test_lora_has_the_parameters_that_its_paper_counts(config: dict, rank: int, published: int):
    """Rank x (inputs + outputs) on q and v. Kills: rank x inputs x outputs; one matrix of the pair."""
    assert lora_parameters(read_shape(config), rank, ["q", "v"]) == published


def test_lora_on_a_role_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean up"):
        lora_parameters(read_shape(GPT3), 4, ["ups"])


def test_a_low_rank_model_trains_what_the_closed_form_says():
    shape = read_shape(small_config("qwen2").to_dict())
    found = count_parameters(tensor_specs(with_low_rank(small_model("qwen2", device="meta"))))
    assert found.trainable == lora_parameters(shape, 2, ["q", "v"])


# memory


@pytest.mark.parametrize("count", [1, 3_000_000_000])
def test_full_training_in_bf16_takes_sixteen_bytes_a_parameter(count: int):
    """2 + 4 + 2 + 8: 48 GB for 3 billion. Kills: dropping the master copy, or one of the two moments."""
    memory = count_memory([TensorSpec("w", (count,), 2, trainable=True)])
    assert memory.state_bytes == memory.total_bytes == 16 * count


def test_fp32_training_needs_no_master_copy_and_takes_sixteen_bytes_too():
    memory = count_memory([TensorSpec("w", (7, 11), 4, trainable=True)])
    assert memory.master_bytes == 0
    assert memory.total_bytes == 16 * 77


def test_gradients_kept_in_float32_beside_a_master_copy_take_two_bytes_more():
    """18 bytes a parameter. Kills: counting what has no master copy, too."""
    specs = [TensorSpec("w", (100,), 2, trainable=True), TensorSpec("delta", (10,), 4, trainable=True)]
    memory = count_memory(specs, fp32_gradients=True)
    assert memory.state_bytes == 18 * 100 + 16 * 10


def test_frozen_weights_take_their_own_bytes_and_nothing_else():
    """Kills: gradients or moments for what does not train."""
    memory = count_memory([TensorSpec("base", (1000,), 2), TensorSpec("delta", (10,), 4, trainable=True)])
    assert memory.as_dict() | {"overhead_bytes": 0} == {
        "weights_bytes": 2040,
        "master_bytes": 0,
        "gradients_bytes": 40,
        "optimizer_bytes": 80,
        "activations_bytes": 0,
        "cache_bytes": 0,
        "offloaded_bytes": 0,
        "total_bytes": 2160,
        "peak_bytes": 2160,
        "overhead_bytes": 0,
        "resident_bytes": IMPORTS_BYTES + 2160,
        "copied_bytes": 120,
        "phases": {},
    }


def test_the_total_is_the_sum_of_its_parts():
    memory = count_memory([TensorSpec("w", (5,), 2, trainable=True)], activations_bytes=13)
    parts = memory.as_dict()
    keys = ("weights_bytes", "master_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
    assert parts["total_bytes"] == sum(parts[key] for key in keys)


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean adamw"):
        count_memory([], optimizer="adamww")


def test_planned_state_is_the_state_of_a_real_step():
    """Weights, gradients and moments of torch's AdamW after one update, byte for byte (its step counters aside)."""
    model = with_low_rank(small_model("llama"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss_of(model)(sample_batch([9, 5])).backward()
    optimizer.step()
    planned = count_memory(tensor_specs(model))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert planned.gradients_bytes == sum(t.numel() * t.element_size() for t in gradients)
    assert planned.optimizer_bytes == sum(t.numel() * t.element_size() for t in moments)
