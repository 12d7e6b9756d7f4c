"""Runs that keep the states of frozen blocks: broken anywhere they go on bit for bit, and leave no file behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_loaded
from tiny_training import lasting, rows
from torch import Tensor

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.lp_ft import LPFT
from tunesmith.adapt.method import Method
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.errors import Stopped
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Sizes, StepStream
from tunesmith.models.inputs import documents
from tunesmith.models.kept import Kept
from tunesmith.models.policy import Policy
from tunesmith.models.trunk import Trunk
from tunesmith.objectives.sft import SFT
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.trainer import train

pytestmark = pytest.mark.slow

PLENTY = 10**9
DATA = rows(12)
BATCH = tiny_batch((37, 5, 21))


@dataclass
class Tuned:
    adapter: Adapter
    policy: Policy
    trunk: Trunk
    parameters: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters, self.phases = self.adapter.parameters, self.adapter.phases
        self.on_phase = self.trunk.begin


def tune(folder: Path, method: Method, *, budget: int = PLENTY, **rest: Any) -> dict[str, Tensor]:
    """Some epochs of a tiny llama; the file stays."""
    settings = TrainSection(steps=16, tokens_per_step=40, micro_batch_tokens=30, lr=1e-2, save_every=5)
    sizes = Sizes(tokens_per_step=40, micro_batch_tokens=30)

    def steps(start: Any) -> StepStream:
        return StepStream(Mixture([len(DATA)]), lambda source, row: DATA[row], sizes, start=start)

    loaded = tiny_loaded("llama")
    adapter = method.attach(loaded, seed=1)
    policy = Policy(loaded, adapter.route)
    tuned = Tuned(adapter, policy, Trunk(loaded, folder / "cache", budget))
    policy.trunk = tuned.trunk if budget else None
    try:
        train(tuned, steps, SFT(), settings, PrecisionSection(compute="fp32"), folder, total_steps=16, **rest)
    finally:
        tuned.trunk.close()
    return {name: value.detach().clone() for name, value in adapter.parameters.items()}


METHODS = {
    "top": TopLayers(layers=1),
    "lora": LoRA(rank=2, targets=(r".*layers\.1\..*(q|down)_proj",), dropout=0.2),
    "phases": LPFT(probe=0.5),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("budget", [PLENTY, 12000])
def test_a_broken_run_is_the_same_run_whatever_became_of_the_file(method: Method, budget: int, tmp_path: Path) -> None:
    """Kills: states that depend on their neighbours, and so on what was in the file when they were needed."""
    whole = tune(tmp_path / "whole", method, budget=budget)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 7:
            raise Stopped("killed", exit_code=1)

    for fate in ("kept", "lost", "cut", "damaged"):
        folder = tmp_path / fate
        with pytest.raises(Stopped):
            tune(folder, method, budget=budget, observers=[stop])
        file = folder / "cache" / "trunk.bin"
        raw = bytearray(file.read_bytes())
        assert len(raw) > 5000
        if fate == "lost":
            file.unlink()
        elif fate == "cut":
            file.write_bytes(raw[:5000])
        elif fate == "damaged":
            raw[3000::700] = bytes(byte ^ 1 for byte in raw[3000::700])
            file.write_bytes(raw)
        found = tune(folder, method, budget=budget, resume=True)
        assert all(torch.equal(found[name], value) for name, value in whole.items())
        assert lasting(folder) == lasting(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_learns_what_it_learns_without(method: Method, tmp_path: Path) -> None:
    """Kills: dropout above that is drawn otherwise; states of a phase that go on in the next, where they have moved."""
    found, plain = tune(tmp_path / "kept", method), tune(tmp_path / "plain", method, budget=0)
    for name, value in plain.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_a_file_of_other_weights_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kills: states that nothing compares with what the model makes."""
    loaded = tiny_loaded("llama")
    policy = Policy(loaded, TopLayers(layers=1).attach(loaded).route).train()
    for _ in range(2):
        policy.trunk = Trunk(loaded, tmp_path / "cache", PLENTY)
        found = policy.token_losses(BATCH)
        policy.trunk.close()
        with torch.no_grad():
            loaded.model.get_input_embeddings().weight.mul_(1.5)
    assert "begun anew" in caplog.text
    other = tiny_loaded("llama")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
        assert not torch.equal(found, policy.token_losses(BATCH))
        assert torch.allclose(found, Policy(other).token_losses(BATCH), atol=1e-5)


def test_another_phase_begins_anew(tmp_path: Path) -> None:
    """Weights moved in between. Kills: states of a phase that serve in a later one because its first row is new."""
    loaded = tiny_loaded("llama")
    policy = Policy(loaded, TopLayers(layers=1).attach(loaded).route).train()
    policy.trunk = Trunk(loaded, tmp_path / "cache", PLENTY)
    whole = tiny_batch((12, 20, 9))
    policy.hidden(documents(whole, [0, 1])[0])
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.mul_(1.5)
    policy.trunk.begin(2)
    part, _ = documents(whole, [2, 1])
    found = policy.hidden(part)
    policy.trunk = None
    assert torch.allclose(found, policy.hidden(part), atol=1e-5)


def test_a_run_takes_its_file_away_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole program. Kills: a trunk that no run gets; a file that stays."""
    from fault_cases import alpaca, config
    from tiny_folders import tiny_folder

    from tunesmith.config import build_config
    from tunesmith.core.yaml import read_yaml_text
    from tunesmith.run import run

    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    for name, count, first in (("train", 12, 0), ("eval", 4, 100)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(alpaca(count, first)) + "\n")
    read: list[bool] = []
    plain = Kept.read
    monkeypatch.setattr(Kept, "read", lambda *args: read.append(plain(*args)) or read[-1])
    found = []
    for budget in (0, PLENTY):
        text = config(
            method="{kind: top_layers, layers: 1}",
            train=f"{{epochs: 3, rows_per_step: 4, cache_trunk: {budget}}}",
            out=str(tmp_path / f"out{budget}"),
        )
        folder = run(build_config(read_yaml_text(text, "test")), before=False)
        assert not (folder / "cache").exists()
        found.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert read.count(True) >= 24
    assert found[1] == pytest.approx(found[0], rel=1e-6)
