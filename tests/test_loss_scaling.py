"""fp16: what underflows is lifted, what overflows is left out, and nothing else changes for either."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_tuning import tuned_model
from tiny_models import tiny_batch, tiny_loaded
from tiny_training import TinyTuned, collate, lasting, rows, run, settings, stream

from tunesmith.adapt.full import Full
from tunesmith.adapt.methods import METHODS
from tunesmith.core.errors import DivergedError
from tunesmith.core.types import Mean
from tunesmith.models.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Single
from tunesmith.train.precision import Precision
from tunesmith.train.scaling import GROW_AFTER, LossScale
from tunesmith.train.schedule import learning_rate
from tunesmith.train.section import PrecisionSection
from tunesmith.train.step import accumulate
from tunesmith.train.trainer import train

FP16 = PrecisionSection(compute="fp16")


class Bursting(SFT):
    """SFT whose loss is so large at some calls that its gradient is not in fp16."""

    def loss(self, policy, batch):
        found = super().loss(policy, batch)
        calls = self.__dict__.setdefault("calls", [0])
        calls[0] += 1
        return Mean(found.total * 1e9, found.weight) if calls[0] in self.__dict__.get("at", ()) else found


def bursting(*at):
    objective = Bursting()
    objective.__dict__["at"] = at
    return objective


def tune(folder, objective, steps=6, **rest):
    section = settings(steps=steps, micro_batch_rows=5, save_every=1, keep=99, warmup=0.5)
    tuned = TinyTuned(dtype=torch.float16)
    more = {"total_steps": steps, "collate": collate} | rest
    train(tuned, stream(rows(), section), objective, section, FP16, folder, **more)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tuned, records


def state(folder, step):
    path = folder / f"checkpoints/step-{step:06d}"
    return load_file(path / "weights.safetensors"), load_file(path / "moments.safetensors")


def same(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_an_overflow_leaves_out_one_step_and_halves_the_scale(tmp_path):
    """Kills: an update with infinite gradients; moments or schedule that move in a step that was left out."""
    _, records = tune(tmp_path, bursting(3))
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert [record["loss_scale"] for record in records] == [2.0**16] * 2 + [2.0**15] * 4
    assert records[2]["grad_norm"] is None
    assert same(state(tmp_path, 2), state(tmp_path, 3)), "parameters and moments as before"
    assert not same(state(tmp_path, 3), state(tmp_path, 4))
    section = settings(steps=6, warmup=0.5)
    assert [record["lr"] for record in records] == [learning_rate(section, at, 6) for at in (1, 2, 3, 3, 4, 5)]


def test_a_run_with_an_overflow_goes_on_as_if_that_batch_had_not_been(tmp_path):
    """The optimizer's count of updates, for one, is not moved. Kills: bias correction that counts what was left out."""
    _, records = tune(tmp_path / "burst", bursting(1))
    weights, moments = state(tmp_path / "burst", 2)
    assert records[0]["skipped_steps"] == 1
    # with one update done, the first moment is a tenth of the gradient and the update is lr everywhere
    first = learning_rate(settings(steps=6, warmup=0.5), 1, 6)
    before = state(tmp_path / "burst", 1)[0]
    for name, value in weights.items():
        moved = moments[f"first/{name}"].abs() > 1e-6
        assert torch.allclose((value - before[name])[moved].abs(), torch.tensor(first), rtol=0.02, atol=0)


def test_a_resumed_run_has_its_scale_and_its_count(tmp_path):
    """Kills: a scale that begins anew, an optimizer that counts steps instead of updates."""
    tune(tmp_path / "whole", bursting(1, 3))
    tune(tmp_path / "broken", bursting(1, 3), steps=3, total_steps=6)
    short = tmp_path / "broken/checkpoints/step-000003/state.json"
    assert json.loads(short.read_text())["scaling"] == {"scale": 2.0**14, "good_steps": 0, "skipped_steps": 2}
    assert json.loads(short.read_text())["updates"] == 1


def test_a_broken_run_continues_bit_for_bit_across_overflows(tmp_path):
    import signal

    from tunesmith.core.errors import Stopped

    tune(tmp_path / "whole", bursting(1, 2, 5))
    for stop in (1, 3):  # with nothing updated yet, and later
        folder = tmp_path / f"broken{stop}"
        end = [lambda record, stop=stop: record["step"] == stop and signal.raise_signal(15)]
        with pytest.raises(Stopped):
            tune(folder, bursting(1, 2, 5), observers=end)
        rest = [at - stop for at in (1, 2, 5) if at > stop]
        tune(folder, bursting(*rest), resume=True)
        assert lasting(folder) == lasting(tmp_path / "whole")


def test_gradients_too_small_for_fp16_survive_with_scaling_and_vanish_without():
    """Kills: a loss that is not scaled, or gradients that are not unscaled."""
    exact, tuned = TinyTuned(), TinyTuned(dtype=torch.float16)
    found = {}
    for name, one, section in (
        ("exact", exact, PrecisionSection(compute="fp32")),
        ("scaled", tuned, FP16),
        ("bare", tuned, PrecisionSection(compute="bf16")),  # masters, no scaling
    ):
        precision = Precision(one.parameters, section)
        precision.backward(SFT().loss(one.policy, collate(rows(8))).total * 1e-8)
        gradients = [master.grad for master in precision.masters.values()]
        if precision.scaling is not None:
            precision.scaling.unscale(gradients)
        found[name] = torch.cat([gradient.flatten() for gradient in gradients])
        precision.close()
    there = found["exact"].abs() > 1e-9
    assert there.float().mean() > 0.3
    assert (found["bare"][there] == 0).float().mean() > 0.5
    assert (found["scaled"][there] == 0).float().mean() == 0
    assert (found["scaled"] - found["exact"]).norm() < 0.01 * found["exact"].norm()


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path):
    """Kills: clipping the scaled gradient, which is thousands of times as long; the recorded norm is the true one."""
    _, records = tune(tmp_path, SFT(), steps=1)
    exact, section = TinyTuned(), settings(steps=1, micro_batch_rows=5)
    precision = Precision(exact.parameters, PrecisionSection(compute="fp32"))
    batches = [collate(group) for group in next(stream(rows(), section)(_start())).micro_batches]
    accumulate(SFT(), exact.policy, batches, precision, Single())
    norm = torch.stack([master.grad.norm() for master in precision.masters.values()]).norm().item()
    assert records[0]["grad_norm"] == pytest.approx(norm, rel=2e-2)


def _start():
    from tunesmith.data.pack import Cursor

    return Cursor(0, 0)


def test_the_scale_grows_after_many_steps_and_ends_where_it_is_not_to_blame():
    scale = LossScale(scale=4.0)
    for _ in range(GROW_AFTER):
        scale.adjust(overflowed=False)
    assert (scale.scale, scale.good_steps) == (8.0, 0)
    for _ in range(3):
        assert scale.can_fall
        scale.adjust(overflowed=True)
    assert (scale.scale, scale.skipped_steps, scale.can_fall) == (1.0, 3, False)


def test_gradients_that_overflow_at_every_scale_end_the_run(tmp_path):
    with pytest.raises(DivergedError, match="norm of the gradient is not a finite number"):
        tune(tmp_path, bursting(*range(1, 99)), steps=30)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 16


def test_fp16_without_masters_is_refused():
    with pytest.raises(ValueError, match="fp16 is trained through fp32 masters"):
        PrecisionSection(compute="fp16", master=False)


@pytest.mark.parametrize("kind", METHODS.names())
def test_every_method_has_in_fp16_the_gradients_of_fp32(kind):
    """Kills: inserts whose gradients are made outside the scaled loss, or in numbers that cannot hold them."""
    found = []
    for dtype, section in ((torch.float32, PrecisionSection(compute="fp32")), (torch.float16, FP16)):
        _, tuned = tuned_model(kind, dtype)
        precision = Precision(tuned.parameters, section)
        accumulate(SFT(), tuned.policy, [tiny_batch()], precision, Single())
        gradients = [master.grad for master in precision.masters.values() if master.grad is not None]
        if precision.scaling is not None:
            precision.scaling.unscale(gradients)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_masters_of_fp16_are_its_own_copies_in_fp32():
    loaded = tiny_loaded(dtype=torch.float16)
    adapter = Full().attach(loaded, "a", 0)
    Policy(loaded, adapter.route)
    masters = Precision(adapter.parameters, FP16).masters
    assert {master.dtype for master in masters.values()} == {torch.float32}


def test_the_tiny_trainer_learns_in_fp16_as_in_fp32(tmp_path):
    losses = {}
    for dtype, section in ((torch.float32, PrecisionSection(compute="fp32")), (torch.float16, FP16)):
        folder = tmp_path / section.compute
        run(folder, settings(steps=12), tuned=TinyTuned(dtype=dtype), precision=section)
        losses[section.compute] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=5e-3)
    assert losses["fp32"][-1] < losses["fp32"][0]
