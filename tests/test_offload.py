"""What waits outside memory changes no bit of a run, leaves memory as planned, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import saved_model
from tiny_models import tiny_batch, tiny_loaded
from tiny_training import TinyTuned, lasting, run, settings
from torch import nn

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError, ResourceError, Stopped
from tunesmith.core.switches import without
from tunesmith.models.load import load, meta
from tunesmith.models.policy import Policy
from tunesmith.plan.trace import measure, sample_batch, trace
from tunesmith.train import apart, scratch, spill
from tunesmith.train.apart import ApartAdamW
from tunesmith.train.optim import AdamW
from tunesmith.train.scratch import let_go, mapped
from tunesmith.train.section import PrecisionSection
from tunesmith.train.spill import Spill

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are tiny: no tensor is too small to wait outside, and an update has several parts."""
    monkeypatch.setattr(spill, "LEAST_BYTES", 64)
    monkeypatch.setattr(apart, "PART", 1024)


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize("offload", ["optimizer", "activations"])
@pytest.mark.parametrize("compute", FORMATS)
def test_a_run_has_the_same_bits_wherever_its_state_waits(compute: Any, offload: str, tmp_path: Path) -> None:
    """Kills: one moment for the other; a master that is not published; a step counted for each part."""
    section = PrecisionSection(compute=compute)
    for where in ("none", offload):
        tuned = TinyTuned(dtype=FORMATS[compute], dropout=0.1)
        run(tmp_path / where, settings(offload=where, weight_decay=0.1), tuned=tuned, precision=section)
        assert not [
            entry for entry in os.scandir(tmp_path / where) if entry.name not in ("checkpoints", "metrics.jsonl")
        ]
    assert lasting(tmp_path / offload) == lasting(tmp_path / "none")


@pytest.mark.parametrize("before", ["none", "optimizer"])
def test_a_resumed_run_may_keep_its_state_elsewhere(before: str, tmp_path: Path) -> None:
    """Kills: a checkpoint of mapped files that differs; moments read into memory and forgotten."""
    after = {"none": "optimizer", "optimizer": "none"}[before]
    section = PrecisionSection(compute="bf16")

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 7:
            raise Stopped("killed", exit_code=1)

    def tuned() -> TinyTuned:
        return TinyTuned(dtype=torch.bfloat16, dropout=0.1)

    run(tmp_path / "whole", tuned=tuned(), precision=section)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", settings(offload=before), tuned=tuned(), precision=section, observers=[stop])
    run(tmp_path / "cut", settings(offload=after), tuned=tuned(), precision=section, resume=True)
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 1023, 1024, 5000])
def test_an_update_in_parts_is_the_update_of_the_whole_bit_for_bit(count: int, tmp_path: Path) -> None:
    """Kills: parts that end within a vector of the processor."""
    torch.manual_seed(0)
    start, gradients = torch.randn(count), [torch.randn(count) for _ in range(3)]
    found = []
    for make in (AdamW, lambda masters, **more: ApartAdamW(masters, lambda shapes: mapped(tmp_path, shapes), **more)):
        master = nn.Parameter(start.clone())
        optimizer = make({"a": master}, weight_decay=0.1, matrices={"a"}, lr_factors={"a": 3.0})
        for gradient in gradients:
            master.grad = gradient.clone()
            optimizer.step(1e-2)
        found.append({"master": master.detach(), "updates": torch.tensor(optimizer.updates), **optimizer.state()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_is_let_go_is_out_of_memory_and_not_lost(tmp_path: Path) -> None:
    """Kills: pages that are never let go; pages of a neighbour that are lost; files that have a name."""
    held = mapped(tmp_path, {"a": (1000, 10_000), "b": (7,)})
    held["b"].fill_(3)
    before = resident()
    held["a"].fill_(1)
    touched = resident()
    let_go(held["a"])
    after = resident()
    assert touched - before > 0.9 * 4e7
    assert after - before < 0.1 * 4e7
    assert held["a"].sum() == 1e7
    assert held["b"].eq(3).all()
    assert list(tmp_path.iterdir()) == []
    del held
    assert not scratch._maps


@pytest.mark.parametrize("offload", ["optimizer", "activations"])
def test_bytes_that_a_run_keeps_outside_are_told(offload: str, tmp_path: Path) -> None:
    tuned = TinyTuned(dtype=torch.bfloat16)
    found = run(tmp_path, settings(offload=offload), tuned=tuned, precision=PrecisionSection(compute="bf16")).ranks[0]
    count = sum(value.numel() for value in tuned.parameters.values())
    state = {"none": (4, 8), "optimizer": (0, 0), "activations": (4, 8)}[offload]
    assert (found["master_bytes"], found["optimizer_bytes"]) == tuple(each * count for each in state)
    if offload == "optimizer":
        assert found["offloaded_bytes"] == 12 * count
    else:
        assert found["offloaded_bytes"] > 1000


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.3), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradients_of_activations_that_waited_are_the_same_bits(
    family: str, method: Any, how: Any, tmp_path: Path
) -> None:
    """Kills: strides that are lost; an activation written over by the next; weights that are kept as they were."""
    found = []
    for out in (False, True):
        loaded = tiny_loaded(family, dtype=torch.bfloat16)
        adapter = method.attach(loaded, seed=1)
        policy = Policy(loaded, adapter.route, recompute=how).train()
        held = Spill(loaded.model, tmp_path)
        for _ in range(2):
            torch.manual_seed(5)
            if not out:
                policy.hidden(tiny_batch()).float().square().sum().backward()
                continue
            with held.forward():
                loss = policy.hidden(tiny_batch()).float().square().sum()
            loss.backward()
        assert (held.most_bytes > 1000) is out
        held.close()
        found.append({name: value.grad for name, value in adapter.parameters.items()})
    for name, value in found[0].items():
        assert (value is None) == (found[1][name] is None)
        assert value is None or torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("how", ["none", "selective"])
@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["lora", "full"])
def test_activations_leave_memory_as_the_plan_says_to_the_byte(method: Any, how: Any, tmp_path: Path) -> None:
    """Kills: a copy that stays; one storage written as often as it is kept; a plan that knows nothing of it."""
    folder, lengths = saved_model("llama", tmp_path), [20, 33, 11]

    def step(loaded: Any) -> tuple[Spill, Any, Any]:
        policy = Policy(loaded, method.attach(loaded).route, recompute=how).train()
        held = Spill(loaded.model, tmp_path)

        def outside(batch: Any) -> Any:
            with held.forward():
                return policy.token_losses(batch).sum()

        return held, outside, lambda batch: policy.token_losses(batch).sum()

    bare, real = meta(folder, dtype="bf16"), load(folder, dtype="bf16")
    counted, outside, _ = step(bare)
    planned = trace(bare.model, outside, lengths, 0.5)
    held, outside, inside = step(real)
    batch = sample_batch(lengths, 0.5)
    with without("shared_prefix"):  # all ids are 0 here, and a plan knows no ids
        plain = measure(real.model, lambda: inside(batch), 64)
        found = measure(real.model, lambda: outside(batch), 64)
    for name in ("activations_bytes", "saved_bytes", "peak_bytes"):
        assert getattr(planned, name) == getattr(found, name), name
    assert counted.most_bytes == held.most_bytes
    assert found.saved_bytes < 0.2 * plain.saved_bytes
    if how == "none":  # what was alive after the forward waits outside, but for what is too small
        assert held.most_bytes + found.saved_bytes == pytest.approx(plain.saved_bytes, rel=0.05)


@pytest.mark.parametrize("offload", ["optimizer", "activations"])
def test_a_full_disk_is_told_in_one_line(offload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: pages without room behind them, which would end the process without a word."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate" if offload == "optimizer" else "pwrite", full)
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        run(tmp_path, settings(offload=offload))
    assert caught.value.exit_code == 5
    assert str(tmp_path) in str(caught.value)


BASE = {"model": "x", "data": {"train": "y"}, "out": "z"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"offload": "optimizer", "optimizer_state": "int8"}}, "leave out one of them"),
        ({"train": {"offload": "optimizer"}, "layout": {"data": 2, "shard": "zero1"}}, "zero1 has parts of them"),
        ({"train": {"offload": "activations"}, "layout": {"pipeline": 2}}, "pipeline makes passes itself"),
        ({"train": {"offload": "disk"}}, "train.offload"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config(BASE | change | {"train": {"steps": 1} | change["train"]})
