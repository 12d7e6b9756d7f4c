"""What is made again in the backward leaves every gradient the same bits, and frees what its trace says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CASES, IN_PLACE, built, model_of
from plan_models import saved_model
from tiny_models import disturb, tiny_batch
from torch import Tensor

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.method import Method
from tunesmith.core.switches import SAVINGS, without
from tunesmith.kernels.build import library
from tunesmith.models.load import Loaded, load, meta
from tunesmith.models.policy import Policy
from tunesmith.models.recompute import Blocks, Recompute, is_again
from tunesmith.models.route import Route
from tunesmith.plan.trace import Traced, measure, sample_batch, trace

pytestmark = pytest.mark.slow

BATCH = tiny_batch((37, 5, 21))
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    "gpt2", "phi3", "opt", "gpt_neox", "bert", "t5",
)  # fmt: skip
HOWS = ("selective", "full", Recompute(1, 0), Recompute(0, 1), Recompute(1, 1))


def learnt(loaded: Any, method: Method, how: Any, seed: int = 3) -> dict[str, Tensor]:
    """Gradients of a disturbed adapter in training, where dropout acts."""
    adapter = method.attach(loaded, "a", 0)
    if method.kind not in IN_PLACE:
        disturb(adapter)
    policy = Policy(loaded, Route(("a",)), recompute=how).train()
    torch.manual_seed(seed)
    loss = policy.hidden(BATCH).square().sum() if loaded.family.kind == "encoder" else policy.token_losses(BATCH).sum()
    loss.backward()
    return {name: p.grad for name, p in adapter.parameters.items() if p.grad is not None}


def check_same(family: str, case: str | Method, folder: Path, how: Any, **changes: Any) -> None:
    method = built(case) if isinstance(case, str) else case
    plain = learnt(model_of(family, folder, **changes), method, "none")
    found = learnt(model_of(family, folder, **changes), method, how)
    assert found.keys() == plain.keys()
    assert found
    for name, grad in plain.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bits_in_every_family(family: str, how: Any, tmp_path: Path) -> None:
    """Kills: a product made again from the sum before the norm; another order of the sum of both passes."""
    check_same(family, "lora", tmp_path, how)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits_with_every_method(case: str, tmp_path: Path) -> None:
    """Kills: maps taken for plain that are not; a route of the backward in place of the forward's."""
    check_same("llama", case, tmp_path, "selective")


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", ["full", "bitfit", "lora dora"])
def test_gradients_are_the_same_bits_in_bf16(family: str, case: str, how: str, tmp_path: Path) -> None:
    check_same(family, case, tmp_path, how, dtype=torch.bfloat16)


DROPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "of an adapter": ("llama", {"dropout": 0.4}, {}),
    "of an adapter in a sandwich of norms": ("gemma2", {"dropout": 0.4}, {}),
    "of attention": ("llama", {}, {"attention_dropout": 0.4}),
    "of what sublayers answer": ("phi3", {"dropout": 0.4}, {"resid_pdrop": 0.3}),
    "inside modules": ("gpt2", {"dropout": 0.4}, {"resid_pdrop": 0.3, "attn_pdrop": 0.2, "embd_pdrop": 0.1}),
}


@pytest.mark.parametrize("how", [*HOWS[:2], Recompute(1, 1)], ids=str)
@pytest.mark.parametrize("drop", DROPS)
def test_what_runs_again_drops_what_it_dropped(drop: str, how: Any, tmp_path: Path) -> None:
    """Kills: a second run that draws numbers of its own."""
    family, settings, changes = DROPS[drop]
    method = LoRA(rank=2, targets=("q", "o", "up", "down"), **settings)
    for off in ((), tuple(SAVINGS)):
        with without(*off):
            check_same(family, method, tmp_path, how, **changes)
    first, other = (learnt(model_of(family, tmp_path, **changes), method, how, seed) for seed in (3, 4))
    assert not torch.equal(*(torch.cat([grad.flatten() for grad in found.values()]) for found in (first, other)))


@pytest.mark.parametrize("saving", SAVINGS)
def test_gradients_are_the_same_bits_without_any_one_saving(saving: str, tmp_path: Path) -> None:
    """Kills: keeping the input of a product that nothing makes again."""
    with without(saving):
        check_same("llama", "lora", tmp_path, "selective")


def step(loaded: Loaded, method: Any, how: Any) -> tuple[Any, Any]:
    policy = Policy(loaded, method.attach(loaded).route, recompute=how).train()
    return loaded.model, lambda batch: policy.token_losses(batch).sum()


def traced(folder: str, method: Any, how: Any) -> Traced:
    model, loss = step(meta(folder, dtype="bf16"), method, how)
    return trace(model, loss, [20, 33, 11], 0.5)


@pytest.mark.parametrize("how", ["selective", Recompute(1, 1)], ids=str)
@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_real_step_holds_to_the_byte_what_its_trace_says(family: str, method: Any, how: Any, tmp_path: Path) -> None:
    """Kills: keeping what was made again until the end of the backward; a closure that holds what it is to make."""
    folder = saved_model(family, tmp_path)
    predicted = traced(folder, method, how)
    model, loss = step(load(folder, dtype="bf16"), method, how)
    batch = sample_batch([20, 33, 11], 0.5)
    with without("shared_prefix"):  # all ids are 0 here, and a plan knows no ids
        measured = measure(model, lambda: loss(batch), 64)
    for name in ("activations_bytes", "peak_bytes", "saved_bytes", "forward_flops", "backward_flops"):
        assert getattr(predicted, name) == getattr(measured, name), name


@pytest.mark.skipif(library() is None, reason="fused blocks need the compiled kernels, and there is no C compiler here")
def test_in_fused_blocks_one_product_pays_for_what_gate_and_up_made(tmp_path: Path) -> None:
    """Kills: running the whole half of the block again; freeing the product but keeping what it becomes."""
    folder = saved_model("llama", tmp_path)
    none, some = (traced(folder, Full(), how) for how in ("none", Recompute(0, 1)))
    width, inner = 32, 88
    assert none.saved_bytes - some.saved_bytes == 64 * 2 * inner * 2  # tokens x (gate and up) x bytes of a number
    assert some.forward_flops == none.forward_flops
    assert some.backward_flops - none.backward_flops == 2 * 64 * width * 2 * inner


def test_blocks_that_keep_nothing_are_passed_over(tmp_path: Path) -> None:
    """Kills: counting from the lowest block of the model, where nothing trains and nothing is kept."""
    loaded = model_of("llama", tmp_path, num_hidden_layers=4)
    assert Blocks(loaded.model, loaded.family).count == 4
    built("top_layers").attach(loaded, "a", 0)
    blocks = Blocks(loaded.model, loaded.family)
    assert blocks.count == 1
    blocks.set(Recompute(1, 0))
    assert [is_again(block) for block in blocks.all] == [False, False, False, True]
    blocks.set("none")
    assert not any(is_again(module) for module in (*blocks.all, *blocks.mlps))


@pytest.mark.parametrize("case", CASES)
def test_no_method_keeps_anything_below_the_blocks_that_are_counted(case: str, tmp_path: Path) -> None:
    """Kills: a lowest block found from what is declared rather than from what trains."""
    if case == "peft":
        pytest.skip("modules of another library: their places are their own")
    loaded = model_of("llama", tmp_path)
    adapter = built(case).attach(loaded, "a", 0)
    policy = Policy(loaded, adapter.route).train()
    blocks, found = Blocks(loaded.model, loaded.family), []
    for lowest in (blocks.lowest, 0):
        blocks.lowest = lowest
        blocks.set(Recompute(len(blocks.all) - lowest, 0))
        found.append(measure(loaded.model, lambda: policy.token_losses(BATCH).sum(), 63).saved_bytes)
    assert found[0] == found[1]
