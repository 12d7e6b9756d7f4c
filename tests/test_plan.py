"""The planner counts what is there: closed forms, the lectures' figures, and real runs of tiny models."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_tokenizer_folder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.method import Method
from tunesmith.core.amounts import in_bytes, in_count, in_time
from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.models.load import Loaded, load, meta
from tunesmith.models.policy import Policy
from tunesmith.plan.compute import Calibration, calibrate, flops_per_token
from tunesmith.plan.memory import TensorSpec, count_memory, count_parameters, tensor_specs
from tunesmith.plan.plan import Workload, make_plan
from tunesmith.plan.shape import ModelShape, lora_parameters, read_shape
from tunesmith.plan.show import bar, show_plan
from tunesmith.plan.trace import LiveStorages, measure, sample_batch, trace

SMALL = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 160,
    },
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    },
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 96},
}


def small_config(family: str, **changes: object):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SMALL[family], **changes})


def small_model(family: str, device: str = "cpu", **changes: object) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if family in ("bert", "distilbert", "t5") else AutoModelForCausalLM
    with torch.device(device):
        return kind.from_config(small_config(family, **changes))


def loss_of(model: nn.Module):
    """Cross-entropy of a decoder at supervised positions only, as the trainer asks for it."""

    def loss(batch):
        positions = batch.positions[None]
        hidden = model.model(input_ids=batch.ids[None], position_ids=positions, use_cache=False)[0][0]
        return nn.functional.cross_entropy(model.lm_head(hidden[batch.sources]).float(), batch.targets)

    return loss


class LowRank(nn.Module):
    """A frozen linear map with a low-rank delta beside it, as small as it can be written."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def with_low_rank(model: nn.Module, rank: int = 2) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, rank)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj, rank)
    return model


# parameters


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
        "total_bytes": 2160,
        "peak_bytes": 2160,
        "overhead_bytes": 0,
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


# tracing


def test_live_storages_count_each_storage_once_and_let_it_go():
    """Kills: counting views; never subtracting what died."""
    with LiveStorages() as live:
        x = torch.zeros(100)
        y = x.view(10, 10).T
        assert live.now_bytes == 400
        del x
        assert live.now_bytes == 400
        del y
        assert live.now_bytes == 0
        torch.zeros(10)
    assert live.peak_bytes == 400


def test_what_was_there_before_counts_nothing_however_it_is_viewed():
    """Kills: taking a transposed weight for an activation."""
    weight = torch.zeros(50, 20)
    with LiveStorages() as live:
        views = [weight.T, weight[3], weight.detach(), weight.add_(1)]
        assert live.peak_bytes == 0
        y = torch.zeros(4, 20) @ views[0]
    assert live.now_bytes == y.numel() * 4


def test_finished_gradients_are_counted_apart_from_activations():
    """Kills: leaving them among the activations."""
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    found = measure(model, lambda: model(torch.zeros(1, 64)).sum(), 1)
    one = 4 * 64 * 64
    assert found.activations_bytes < 3 * one
    assert found.peak_bytes >= 6 * one


def run_really(model: nn.Module, lengths: list[int], share: float):
    batch = sample_batch(lengths, share)
    model.zero_grad(set_to_none=True)
    return measure(model, lambda: loss_of(model)(batch), sum(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["full", "low_rank", "one_block"])
def test_a_trace_without_data_sees_what_a_real_run_holds(how: str, dtype: torch.dtype):
    """Within 5 %. Kills: tracing on meta itself, where attention is unfused and keeps every score."""
    model, empty = small_model("llama"), small_model("llama", device="meta")
    for each in (model, empty):
        if how == "low_rank":
            with_low_rank(each)
        if how == "one_block":
            each.requires_grad_(False)
            each.model.layers[1].requires_grad_(True)
        each.to(dtype)
    predicted = trace(empty, loss_of(empty), [48, 80], 0.5)
    measured = run_really(model, [48, 80], 0.5)
    assert predicted.activations_bytes == pytest.approx(measured.activations_bytes, rel=0.05)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    assert (predicted.forward_flops, predicted.backward_flops) == (
        measured.forward_flops,
        measured.backward_flops,
    )


def test_a_trace_leaves_the_model_as_it_was():
    """Kills: leaving the pretended tensors in place."""
    model = small_model("llama")
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    trace(model, loss_of(model), [16])
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recomputation_is_seen_as_less_memory_and_more_work():
    model = small_model("llama", device="meta", num_hidden_layers=6)
    plain = trace(model, loss_of(model), [64])
    model.activation_checkpointing_enable()
    model.train()
    frugal = trace(model, loss_of(model), [64])
    assert frugal.activations_bytes < 0.6 * plain.activations_bytes
    assert frugal.backward_flops > 1.2 * plain.backward_flops


def saved_model(family: str, folder: Path) -> Path:
    """A folder that `load` and `meta` open."""
    tiny_tokenizer_folder(folder)
    small_model(family, vocab_size=384).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_our_own_step_holds_to_the_byte_what_its_trace_says(
    family: str, method: Method, recompute: str, tmp_path: Path
):
    """Packed documents, bf16, chunked head. Kills: any operation that asks whether it is traced."""
    folder = saved_model(family, tmp_path)

    def step(loaded: Loaded):
        adapter = method.attach(loaded)
        policy = Policy(loaded, adapter.route, recompute=recompute).train()
        return loaded.model, lambda batch: policy.token_losses(batch).sum()

    model, loss = step(meta(folder, dtype="bf16"))
    predicted = trace(model, loss, [20, 33, 11], 0.5)
    model, loss = step(load(folder, dtype="bf16"))
    batch = sample_batch([20, 33, 11], 0.5)
    measured = measure(model, lambda: loss(batch), 64)
    for name in ("activations_bytes", "peak_bytes", "saved_bytes", "forward_flops", "backward_flops"):
        assert getattr(predicted, name) == getattr(measured, name), name


# work


def test_traced_work_is_what_torch_counts():
    """On attention written as products, which torch's own counter knows. Kills: 1 for a multiply-add."""
    model = small_model("llama", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        loss_of(model)(sample_batch([32], 0.5)).backward()
    assert trace(model, loss_of(model), [32], 0.5).flops == counter.get_total_flops()


def closed_form(shape: ModelShape, length: int, share: float, **kinds: object) -> float:
    return flops_per_token(shape, context=length, supervised_share=share, **kinds).total * length


def test_the_closed_form_of_full_training_is_the_traced_work():
    """6 N, 3.5 x attention, 6 N of the head where supervised. Kills: a head at every token; no recomputed scores."""
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    traced = trace(model, loss_of(model), [64], 0.5)
    trained = shape.matrix_parameters
    assert closed_form(shape, 64, 0.5, trained=trained, head_trained=True) == traced.flops


def test_freezing_saves_the_gradient_of_weights_and_nothing_else():
    """LoRA: 2 N forward, 2 N handed down, 2 x its own. Kills: 6 N for a frozen base; 2 N for forward alone."""
    shape = read_shape(small_config("llama").to_dict())
    model = with_low_rank(small_model("llama", device="meta"))
    traced = trace(model, loss_of(model), [64], 0.5)
    own = lora_parameters(shape, 2, ["q", "v"])
    planned = closed_form(shape, 64, 0.5, trained=own, inserted=own)
    # nothing below q, k, v of the first block wants a gradient, nor what A of q and v reads
    entry = 2 * 64 * (3 * 32 * 32 + 2 * 2 * 32)
    assert traced.flops == planned - entry


def test_a_calibration_is_measured_once_and_then_read(tmp_path):
    shape = read_shape(small_config("llama").to_dict())
    first = calibrate(shape, 64, seconds=0.05, folder=tmp_path)
    assert calibrate(shape, 64, seconds=0.05, folder=tmp_path) == first
    assert min(first.flops_per_second, first.bytes_per_second, first.operation_seconds) > 0


def test_a_damaged_calibration_is_measured_again(tmp_path):
    (tmp_path / "calibration.json").write_text('{"half": ')
    shape = read_shape(small_config("llama").to_dict())
    assert calibrate(shape, 64, seconds=0.05, folder=tmp_path).flops_per_second > 0


# the plan


WORK = Workload(steps=10, tokens=1280, lengths=(128,), supervised_share=0.5)
FAST = Calibration(flops_per_second=1e9, bytes_per_second=1e9, operation_seconds=0.0)


def test_a_plan_has_the_keys_that_others_read():
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    plan = make_plan(model, shape, WORK, loss=loss_of(model), calibration=FAST).as_dict()
    assert {"parameters", "memory", "steps", "tokens", "flops", "seconds"} <= set(plan)
    assert set(plan["parameters"]) == {"total", "trainable"}
    assert (plan["steps"], plan["tokens"]) == (10, 1280)
    assert plan["seconds"] > plan["flops"] / 1e9
    json.dumps(plan, allow_nan=False)


@pytest.mark.parametrize("low_rank", [False, True])
def test_the_estimate_agrees_with_the_trace_where_both_exist(low_rank: bool):
    model = small_model("llama", device="meta", num_hidden_layers=8)
    if low_rank:
        with_low_rank(model)
    shape = read_shape(small_config("llama", num_hidden_layers=8).to_dict())
    traced = make_plan(model, shape, WORK, loss=loss_of(model))
    estimated = make_plan(model, shape, WORK)
    assert traced.parameters == estimated.parameters
    assert estimated.flops == pytest.approx(traced.flops, rel=0.1)
    assert estimated.memory.activations_bytes == pytest.approx(traced.memory.activations_bytes, rel=0.5)
    assert (estimated.as_dict()["activations"], traced.as_dict()["activations"]) == ("estimated", "traced")


def test_twice_the_tokens_are_twice_the_work_and_no_more_memory():
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    once = make_plan(model, shape, WORK, loss=loss_of(model))
    twice = make_plan(model, shape, Workload(20, 2560, (128,), 0.5), loss=loss_of(model))
    assert twice.flops == 2 * once.flops
    assert twice.memory == once.memory


def test_a_plan_reads_well_in_a_narrow_terminal():
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    console = Console(width=70, record=True, file=io.StringIO())
    console.print(show_plan(make_plan(model, shape, WORK, loss=loss_of(model), calibration=FAST).as_dict()))
    text = console.export_text()
    assert "100 %" in text
    assert "activations" in text
    assert "10 steps, 1,280 tokens" in text
    assert max(map(len, text.splitlines())) <= 70


def test_amounts_are_written_for_people_in_powers_of_ten():
    assert [in_bytes(n) for n in (0, 999, 12_300, 731e6, 48e9, 1.2e12)] == [
        "0 bytes",
        "999 bytes",
        "12.3 kB",
        "731 MB",
        "48.0 GB",
        "1.2 TB",
    ]
    assert in_bytes(999_960) == "1.0 MB"
    assert in_count(134_500_000) == "134 M"
    assert [in_time(s) for s in (0.2, 48, 250, 11_520, 180_000)] == [
        "1 s",
        "48 s",
        "4 min 10 s",
        "3 h 12 min",
        "2 d 2 h",
    ]


def test_a_bar_is_as_long_as_its_value_and_never_vanishes():
    assert bar(10, 10, 8) == "█" * 8
    assert bar(5, 10, 8) == "█" * 4
    assert bar(1, 10_000, 8) == "▏"
    assert bar(0, 10, 8) == ""


def test_shapes_and_counting_import_no_torch():
    code = "import sys, tunesmith.plan.plan, tunesmith.plan.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
