"""LoRA+: two learning rates, the formula, who gets which, and a resume that is bit-identical."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_loaded
from tiny_training import TinyTuned, run, settings

from tunesmith.adapt.lora import LoRA
from tunesmith.models.policy import Policy
from tunesmith.run import _Tuned
from tunesmith.train.optim import AdamW


def test_a_step_with_two_rates_is_the_formula() -> None:
    """In float64, with decay, moments shared by nothing. Kills: one rate for all; the ratio on the gradient."""
    draw = torch.Generator().manual_seed(0)
    start = {name: torch.randn(3, 2, generator=draw).double() for name in "AB"}
    masters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = AdamW(masters, weight_decay=0.1, lr_factors={"B": 16.0})
    value = {name: held.clone() for name, held in start.items()}
    first, second = ({name: torch.zeros(3, 2).double() for name in "AB"} for _ in range(2))
    for step in range(1, 5):
        for name in "AB":
            gradient = torch.randn(3, 2, generator=draw).double()
            masters[name].grad = gradient.clone()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            lr = 0.01 * step * (16 if name == "B" else 1)
            moved = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            value[name] = value[name] - lr * (moved + 0.1 * value[name])
        optimizer.step(0.01 * step)
    for name in "AB":
        torch.testing.assert_close(masters[name].detach(), value[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_factor_that_starts_at_zero_takes_the_ratio(family: str) -> None:
    """B at a linear map, A at an embedding. Kills: the ratio on both; on what trains whole; lost before the trainer."""
    loaded = tiny_loaded(family)
    method = LoRA(rank=2, targets=("q", "embed", "down"), also_train=("norm",), lr_ratio=4.0)
    adapter = method.attach(loaded)
    fast = {name for name, value in adapter.parameters.items() if name.endswith((".A", ".B")) and not value.any()}
    assert adapter.lr_factors == dict.fromkeys(fast, 4.0)
    assert {name.rpartition(".")[2] for name in fast if "embed" in name.split(".")} == {"A"}
    assert len(fast) == len(adapter.inserts())
    assert _Tuned(adapter, Policy(loaded, adapter.route), None, {}).lr_factors == adapter.lr_factors
    adapter.detach()
    assert LoRA(rank=2).attach(loaded).lr_factors == {}


def trained(folder: Path, factors: dict[str, float], *, resume: bool = False) -> dict[str, torch.Tensor]:
    tuned = TinyTuned()
    tuned.lr_factors = factors  # type: ignore[attr-defined]
    run(folder, settings(steps=8, save_every=3, keep=9), tuned=tuned, resume=resume)
    return {name: value.detach().clone() for name, value in tuned.parameters.items()}


def test_a_resumed_run_with_two_rates_is_the_run_that_was_not_broken(tmp_path: Path) -> None:
    """Kills: rates that a checkpoint forgets; moments kept in the order of the groups."""
    factors = {"up.weight": 8.0, "norm.bias": 0.0}
    whole = trained(tmp_path / "run", factors)
    for step in (6, 8):  # as if killed before them
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06}")
    again = trained(tmp_path / "run", factors, resume=True)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    plain = trained(tmp_path / "plain", {})
    assert not torch.equal(plain["up.weight"], whole["up.weight"])
    assert torch.equal(whole["norm.bias"], TinyTuned().parameters["norm.bias"])
