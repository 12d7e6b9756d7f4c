"""Every method, trained by the one loop on a real architecture: what changes, resume, how a step is cut."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_loaded
from tiny_training import lasting, rows

from tunesmith.adapt.methods import METHODS
from tunesmith.core.errors import Stopped
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Sizes, StepStream
from tunesmith.models.policy import Policy
from tunesmith.objectives.objectives import OBJECTIVES
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.trainer import train

DATA = rows(20)
# the fast tests take a method with inserts, one in place, one of soft tokens
KINDS = [
    kind if kind in ("lora", "full", "prompt") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in METHODS.names()
]


@dataclass
class Tuned:
    parameters: dict
    policy: Policy


def tuned_model(kind, dtype, recompute="none"):
    loaded = tiny_loaded("llama", dtype=dtype)
    adapter = METHODS.load(kind)().attach(loaded, seed=1)
    return loaded.model, Tuned(adapter.parameters, Policy(loaded, adapter.route, recompute=recompute))


def tune(folder, kind, dtype=torch.float32, micro=40, recompute="none", **rest):
    settings = TrainSection(steps=6, tokens_per_step=40, micro_batch_tokens=micro, lr=1e-2, save_every=4)
    sizes = Sizes(tokens_per_step=settings.tokens_per_step, micro_batch_tokens=settings.micro_batch_tokens)

    def steps(start):
        return StepStream(Mixture([len(DATA)]), lambda source, row: DATA[row], sizes, start=start)

    model, tuned = tuned_model(kind, dtype, recompute)
    precision = PrecisionSection(compute="bf16" if dtype == torch.bfloat16 else "fp32")
    objective = OBJECTIVES.load("sft")()
    train(tuned, steps, objective, settings, precision, folder, total_steps=6, **rest)
    return model, tuned


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_of_any_method_continues_bit_for_bit(tmp_path, kind, dtype):
    """Kills: state of a method that is not among its parameters; masters that are rounded on the way."""
    whole = tune(tmp_path / "whole", kind, dtype)[1].parameters
    with pytest.raises(Stopped):
        tune(tmp_path / "broken", kind, dtype, observers=[lambda r: r["step"] == 3 and signal.raise_signal(15)])
    continued = tune(tmp_path / "broken", kind, dtype, resume=True)[1].parameters
    assert all(torch.equal(whole[name], value) for name, value in continued.items())
    newest = {name: data for name, data in lasting(tmp_path / "whole").items() if "000004" not in name}
    assert newest.items() <= lasting(tmp_path / "broken").items()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_declared_changes_and_nothing_else(tmp_path, kind, dtype):
    """Kills: a base that is trained along; a declared parameter without gradient."""
    model, tuned = tune(tmp_path, kind, dtype)
    fresh, before = tuned_model(kind, dtype)
    mine = {id(value) for value in tuned.parameters.values()}
    start = dict(fresh.named_parameters())
    assert set(before.parameters) == set(tuned.parameters)
    for name, value in model.named_parameters():
        # rounded to bf16 a weight may stay; its master may not, which test_precision looks at
        if id(value) not in mine:
            assert torch.equal(value, start[name]), name
        elif value.dtype == torch.float32:
            assert not torch.equal(value, start[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_recomputation_change_nothing(tmp_path, kind):
    """Kills: losses divided within the policy; dropout or route lost in the second forward."""
    ends, first = {}, {}
    for name, how in {"whole": {}, "cut": {"micro": 9}, "again": {"recompute": "full"}}.items():
        ends[name] = tune(tmp_path / name, kind, **how)[1].parameters
        first[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
    assert first["cut"]["micro_batches"] > first["whole"]["micro_batches"]
    for field in ("loss", "grad_norm"):
        assert first["cut"][field] == pytest.approx(first["whole"][field], rel=1e-6)
    assert all(torch.equal(ends["again"][name], value) for name, value in ends["whole"].items())
