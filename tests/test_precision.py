"""Masters: what is held in bf16 is trained as well as what is held in fp32."""

from __future__ import annotations

import pytest
import torch
from tiny_training import TinyTuned, collate, rows, run, settings

from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Single
from tunesmith.train.optim import AdamW
from tunesmith.train.precision import Precision, resolve
from tunesmith.train.section import PrecisionSection
from tunesmith.train.step import accumulate, update

MASTER, BARE = PrecisionSection(compute="bf16"), PrecisionSection(compute="bf16", master=False)


def moved(dtype: torch.dtype, section: PrecisionSection, lr: float) -> float:
    """Fraction of the trained numbers that 20 updates have changed, among those with a gradient."""
    tuned = TinyTuned(dtype=dtype)
    precision = Precision(tuned.parameters, section)
    optimizer = AdamW(precision.masters)
    start = {name: master.detach().clone() for name, master in precision.masters.items()}
    for step in range(20):
        accumulate(SFT(), tuned.policy, [collate(rows(8, seed=step))], precision, Single())
        update(optimizer, precision, Single(), lr=lr, clip=1.0)
    changed = [precision.masters[name].detach() != start[name] for name in start]
    return torch.cat([tensor.flatten() for tensor in changed]).float().mean().item()


def test_bf16_with_masters_moves_as_many_numbers_as_fp32_at_a_small_rate():
    """Kills: an optimizer that updates the bf16 weights themselves."""
    exact = moved(torch.float32, PrecisionSection(compute="fp32"), 1e-5)
    assert moved(torch.bfloat16, MASTER, 1e-5) >= 0.95 * exact
    assert moved(torch.bfloat16, BARE, 1e-5) < 0.5 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_alone_shrinks_the_norm_by_its_formula(dtype):
    """Kills: decay that is rounded away in bf16."""
    lr, decay, steps = 1e-3, 0.1, 100
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype))
    precision = Precision({"weight": weight}, MASTER)
    optimizer = AdamW(precision.masters, weight_decay=decay)
    start = precision.masters["weight"].norm().item()
    for _ in range(steps):
        precision.masters["weight"].grad = torch.zeros(8, 8)
        update(optimizer, precision, Single(), lr=lr, clip=1.0)
    shrunk = precision.masters["weight"].norm().item() / start
    # 0.9999 is off by up to 6e-8 in fp32, a hundred times over
    assert shrunk == pytest.approx((1 - lr * decay) ** steps, rel=6e-6)
    assert torch.equal(weight, precision.masters["weight"].to(dtype))


def test_gradients_of_micro_batches_are_added_in_fp32():
    """Kills: accumulating in .grad of the bf16 parameter, where small summands vanish."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    precision = Precision({"weight": weight}, MASTER)
    precision.backward((weight * 256).sum())
    for _ in range(8):
        precision.backward((weight * 0.5).sum())
        assert weight.grad is None
    assert precision.masters["weight"].grad.item() == 260.0
    assert precision.masters["weight"].grad.dtype == torch.float32


def test_after_a_run_the_weights_are_the_masters_rounded(tmp_path):
    """Kills: an update that is not written back."""
    from safetensors.torch import load_file

    tuned = TinyTuned(dtype=torch.bfloat16)
    before = {name: value.detach().clone() for name, value in tuned.parameters.items()}
    run(tmp_path, settings(steps=4), tuned=tuned, precision=MASTER)
    stored = load_file(tmp_path / "checkpoints/step-000004/weights.safetensors")
    for name, value in tuned.parameters.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(value, stored[name].bfloat16())
        assert not torch.equal(value, before[name])


def test_parameters_in_fp32_are_their_own_masters():
    tuned = TinyTuned()
    precision = Precision(tuned.parameters, MASTER)
    assert all(precision.masters[name] is value for name, value in tuned.parameters.items())


def test_a_closed_precision_leaves_ordinary_parameters():
    """Kills: a hook that keeps stealing gradients after the run."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    Precision({"weight": weight}, MASTER).close()
    weight.sum().backward()
    assert weight.grad is not None


def test_training_without_masters_is_warned_about_once(caplog):
    Precision(TinyTuned(dtype=torch.bfloat16).parameters, BARE)
    assert caplog.text.count("stagnates") == 1
    caplog.clear()
    Precision(TinyTuned().parameters, BARE)
    assert not caplog.text


def test_auto_is_a_format_that_the_machine_has():
    assert resolve(PrecisionSection()) in ("fp32", "bf16")
    assert resolve(PrecisionSection(compute="fp32")) == "fp32"
    assert resolve(PrecisionSection(compute="bf16")) == "bf16"
