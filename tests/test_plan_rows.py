"""A plan sees the run's own rows: what they share, what dropout keeps, what is there beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plan_models import saved_model

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.models.load import Loaded, load, meta
from tunesmith.models.policy import Policy
from tunesmith.plan.foreseen import Met, Seen, seen
from tunesmith.plan.memory import Memory
from tunesmith.plan.moments import Moments
from tunesmith.plan.trace import Traced, measure, sample_batch, trace_seen


def alike(share: int = 24):
    """Documents of which the first and the last two begin with the same `share` tokens."""
    torch.manual_seed(0)
    batch = sample_batch([40, 33, 36, 30], 0.9)
    ids = torch.randint(3, 60, batch.ids.shape)
    for start in (73, 109):
        ids[start : start + share] = ids[:share]
    return replace(batch, ids=ids)


@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.0), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trace_of_real_rows_holds_to_the_byte_what_a_training_step_does(family, method, tmp_path: Path):
    """Shared beginnings (llama) and masks of dropout (gpt2). Kills: tracing in evaluation mode; each by itself."""
    folder = saved_model(family, tmp_path)

    def step(loaded: Loaded):
        policy = Policy(loaded, method.attach(loaded).route).train()
        return policy, lambda batch: policy.token_losses(batch).sum()

    batch = alike()
    policy, loss = step(meta(folder, dtype="bf16"))
    known = seen(policy, batch)
    predicted = trace_seen(policy.model, loss, known)
    policy, loss = step(load(folder, dtype="bf16"))
    measured = measure(policy.model, lambda: loss(batch), batch.ids.numel())
    assert (known.compact is not None) == (family == "llama")
    for name in ("activations_bytes", "peak_bytes", "forward_peak_bytes", "forward_flops", "backward_flops"):
        # what is shared is looked up with a few numbers that a trace has none of
        assert getattr(predicted, name) == pytest.approx(getattr(measured, name), rel=0.01), name


def test_gradients_of_parameters_with_masters_are_counted_in_float32():
    """Kills: two bytes a number, as the backward gives them."""
    model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

    def found(wide: bool) -> Traced:
        model.zero_grad(set_to_none=True)
        return measure(model, lambda: model(torch.ones(1, 64, dtype=torch.bfloat16)).sum(), 1, wide_gradients=wide)

    assert found(False).peak_bytes < 2 * 64 * 64 + 200
    assert found(True).peak_bytes >= (2 + 4) * 64 * 64  # the one that came, and the one it is handed over to


STATE = Memory(100, 0, 50, 200, 0)


def traced_of(size: int) -> Traced:
    return Traced(size, size + 20, 0, 0, 0, 0, 0, 1, forward_peak_bytes=size, finished_bytes=20)


def met(size: int, *, gradients: bool, moments: bool) -> Met:
    return Met(Seen(sample_batch([8])), size, gradients, moments)


@pytest.mark.parametrize(("first", "second", "peak"), [(80, 60, 410), (300, 60, 420), (80, 100, 450)])
def test_the_fullest_moment_is_not_always_the_largest_micro_batch(first: int, second: int, peak: int):
    """A first one without moments against a later one with all: 100 + first + 20, or 350 + second."""
    found = Moments(
        STATE,
        lambda one: traced_of(one.size_bytes),
        [met(first, gradients=False, moments=False), met(second, gradients=True, moments=True)],
    ).fullest()
    assert found.peak_bytes == peak


def test_what_cannot_be_the_fullest_is_not_traced():
    """Each trace takes seconds. Kills: tracing every kind."""
    asked: list[int] = []

    def trace(one: Met) -> Traced:
        asked.append(one.size_bytes)
        return traced_of(one.size_bytes)

    kinds = [met(90, gradients=False, moments=False), met(100, gradients=True, moments=True)]
    Moments(STATE, trace, kinds).fullest()
    assert asked == [100]


def test_padding_weighs_where_rows_are_padded():
    """Rows 10 and 90 take 180 places. Kills: the tokens alone."""
    from tunesmith.plan.shape import ModelShape
    from tunesmith.run.largest import _Size

    shape = ModelShape("llama", 2, 32, 48, 4, 4, 8, 97)
    rows = [SimpleNamespace(ids=range(10), supervised=[]), SimpleNamespace(ids=range(90), supervised=[])]
    even = [SimpleNamespace(ids=range(70), supervised=[])] * 2

    def size(packed: bool) -> _Size:
        config = SimpleNamespace()
        model = SimpleNamespace(dtype=torch.float32)
        policy = SimpleNamespace(packed=packed, model=model, config=config, family=SimpleNamespace(kind="encoder"))
        return _Size(policy, shape, False)  # type: ignore[arg-type]

    assert size(True).bytes(rows) < size(True).bytes(even)
    assert size(False).bytes(rows) > size(False).bytes(even)
