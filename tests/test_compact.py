"""Optimizer moments in bf16 and int8: near AdamW's, never still, the same after a resume, counted to the byte."""

from __future__ import annotations

import signal
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyTuned, lasting, run, settings
from torch import nn

from tunesmith.core.errors import Stopped
from tunesmith.core.moments import BLOCK, SMALL, blocks_of, moment_bytes
from tunesmith.kernels.codes import from_dynamic, to_dynamic
from tunesmith.plan.memory import TensorSpec, count_memory
from tunesmith.train.compact import CompactAdamW, scattered
from tunesmith.train.optim import AdamW
from tunesmith.train.section import PrecisionSection
from tunesmith.train.spots import Spot

STATES = ("bf16", "int8")


def weights(*shapes):
    draw = torch.Generator().manual_seed(0)
    return {f"w{at}": nn.Parameter(torch.randn(shape, generator=draw)) for at, shape in enumerate(shapes)}


def descend(optimizer, steps, lr=1e-2):
    """Steps down to a target on gradients with noise of their own; how far from it everything ends."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for master in optimizer.masters.values():
            master.grad = master.detach() - 3.0 + 0.3 * torch.randn(master.shape, generator=draw)
        optimizer.step(lr)
    return torch.cat([(master.detach() - 3.0).flatten() for master in optimizer.masters.values()])


@pytest.mark.parametrize("state", STATES)
def test_the_first_update_is_adamw_s(state):
    """Before anything is rounded there is nothing to differ. Kills: another order of decay, bias and factor."""
    made = [weights((80, 64), (16,)) for _ in range(2)]
    more = {"weight_decay": 0.1, "lr_factors": {"w1": 4.0}}
    compact, plain = CompactAdamW(made[0], state, **more), AdamW(made[1], **more)
    descend(compact, 1)
    descend(plain, 1)
    for name, value in made[0].items():
        assert torch.allclose(value, made[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_many_updates_end_where_adamw_ends(state):
    made = [weights((80, 64), (16,)) for _ in range(2)]
    apart, exact = descend(CompactAdamW(made[0], state), 700, 2e-2), descend(AdamW(made[1]), 700, 2e-2)
    assert exact.abs().mean() < 0.1
    assert apart.abs().mean() < 1.5 * exact.abs().mean()
    assert apart.abs().max() < 1.0


@pytest.mark.parametrize("state", STATES)
def test_a_second_moment_that_falls_by_a_thousandth_an_update_falls(state):
    """Kills: rounding to nearest, which gives back the same number for ever."""
    made = weights((80, 64))
    optimizer = CompactAdamW(made, state)
    made["w0"].grad = torch.ones(80, 64)
    optimizer.step(0.0)
    made["w0"].grad = torch.zeros(80, 64)
    # one number of a block stays large, so that the others are between codes
    made["w0"].grad[:, 0] = 1.0
    for _ in range(400):
        optimizer.step(0.0)
    second = optimizer._read("second/w0").view(80, 64)[:, 1:]
    expected = 0.001 * 0.999**400
    assert second.mean().item() == pytest.approx(expected, rel=0.1)


def test_numbers_scattered_on_the_grid_are_right_on_average():
    """Kills: truncation, or chance that does not go by nearness."""
    x = torch.full((200_000,), 1.0 + 2.0**-10)  # an eighth of the step of 2^-7
    chance = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    found = scattered(x, chance)
    assert set(found.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert (found > 1).float().mean().item() == pytest.approx(1 / 8, abs=0.01)
    grid = torch.randn(1000).bfloat16().float()
    assert torch.equal(scattered(grid, chance[:1000]), grid)


def test_codes_of_pieces_are_those_of_the_whole():
    """A cut within a block, a piece within one, an empty piece. Kills: a block that begins with the piece."""
    whole = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    ends = (0, 300, 310, 310, 1024, 3000)
    shared = (1,)  # block 1 is of three pieces; block 4 begins at a cut
    everything = Spot(3000, [(0, 3000)], ())
    wanted, scales = coded(whole, everything, {})
    found = []
    for first, end in pairwise(ends):
        spot = Spot(3000, [(first, end)], shared)
        here = {spot.place(1): whole[256:512].abs().max().item()} if spot.within(1).stop > spot.within(1).start else {}
        codes, mine = coded(whole[first:end], spot, here)
        found.append(codes)
        assert torch.equal(mine, scales[slice(*blocks_of(first, end))])
        assert torch.equal(
            from_dynamic(codes, mine, signed=True, block=BLOCK, lead=spot.lead),
            from_dynamic(wanted, scales, signed=True, block=BLOCK)[first:end],
        )
    assert torch.equal(torch.cat(found), wanted)


def coded(numbers, spot, largest):
    chance = spot.chance(0, "moments", 1, "w")
    return to_dynamic(numbers, signed=True, block=BLOCK, chance=chance, lead=spot.lead, largest=largest)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_a_broken_run_continues_bit_for_bit(tmp_path, state, compute, monkeypatch):
    """Kills: moments that are widened on the way to the disk; rounding that draws anew."""
    monkeypatch.setattr("tunesmith.core.moments.SMALL", 256)  # so that the tiny model has codes
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]

    def tune(name, **rest):
        section = settings(steps=6, save_every=2, optimizer_state=state)
        tuned = TinyTuned(dtype=dtype, dropout=0.1)
        run(tmp_path / name, section, tuned=tuned, precision=PrecisionSection(compute=compute), **rest)

    tune("whole")
    with pytest.raises(Stopped):
        tune("broken", observers=[lambda record: record["step"] == 3 and signal.raise_signal(15)])
    tune("broken", resume=True)
    newest = {name: data for name, data in lasting(tmp_path / "whole").items() if "000004" in name or "000006" in name}
    assert newest.items() <= lasting(tmp_path / "broken").items()
    kept = load_file(tmp_path / "whole/checkpoints/step-000006/moments.safetensors")
    wanted = torch.bfloat16 if state == "bf16" else torch.uint8
    assert kept["first/up.weight"].dtype == kept["second/up.weight"].dtype == wanted


@pytest.mark.parametrize("state", STATES)
def test_the_plan_counts_moments_to_the_byte(state):
    """Kills: scales left out, small tensors counted as codes."""
    made = weights((80, 64), (SMALL - 1,), (SMALL,), (5001,))
    optimizer = CompactAdamW(made, state)
    descend(optimizer, 1)
    held = sum(value.numel() * value.element_size() for value in optimizer.state().values())
    specs = [TensorSpec(name, tuple(value.shape), 4, trainable=True) for name, value in made.items()]
    assert count_memory(specs, optimizer_state=state).optimizer_bytes == held
    assert moment_bytes(1000, "fp32") == 4000
