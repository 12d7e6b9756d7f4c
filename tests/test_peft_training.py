"""Bridged tuners in training: AdaLoRA's schedule is peft's own, every type goes through a run, resume is exact."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import bridged, fresh, said_by, trained_by
from tiny_folders import tiny_folder
from tiny_models import answers, tiny_loaded
from tiny_training import collate, lasting, rows, stream
from torch import Tensor, nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.peft_bridge import TYPES
from tunesmith.adapt.peft_layers import whole_of
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError, Stopped
from tunesmith.data.pack import Cursor
from tunesmith.models.load import load
from tunesmith.models.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.run import run
from tunesmith.train.optim import BETAS, EPS
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.trainer import train

pytestmark = pytest.mark.slow

DATA = rows(20)
STEPS = 10
SECTION = TrainSection(
    steps=STEPS, rows_per_step=4, micro_batch_rows=2, lr=1e-2, schedule="constant", warmup=0.0, clip=0.0, save_every=3
)
# ranks are given away in the steps 2 to 7; the schedule is over after 8 of 10
SCHEDULE = {"tinit": 1, "tfinal": 2, "orth_reg_weight": 0.1}


@dataclass
class Tuned:
    adapter: Adapter
    policy: Policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)


def tuned(kind: str, folder: Path, seed: int = 1, **rest: Any) -> Adapter:
    """Trains a type on the tiny llama."""
    loaded = tiny_loaded("llama")
    adapter = bridged(kind, **(SCHEDULE if kind == "ADALORA" else {})).attach(loaded, seed=seed)
    train(
        Tuned(adapter, Policy(loaded, adapter.route)), stream(DATA, SECTION), SFT(), SECTION,
        PrecisionSection(compute="fp32"), folder, total_steps=STEPS, collate=collate, **rest,
    )  # fmt: skip
    return adapter


def by_peft(theirs: Any) -> dict[str, nn.Parameter]:
    """The same steps as peft's documentation writes them: one row at a time, with peft's own penalty and allocator."""
    parameters = trained_by(theirs)
    optimizer = torch.optim.AdamW(parameters.values(), lr=SECTION.lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    settings = theirs.peft_config["default"]
    for number, step in zip(range(1, STEPS + 1), stream(DATA, SECTION)(Cursor(0, 0)), strict=False):
        batch = [row for micro in step.micro_batches for row in micro]
        losses: list[Tensor] = []
        for row in batch:
            supervised = [place for place in range(1, len(row.ids)) if row.supervised[place]]
            logits = theirs.base_model.model(input_ids=torch.tensor([row.ids])).logits[0]
            wanted = torch.tensor([row.ids[place] for place in supervised])
            logits = logits[torch.tensor(supervised) - 1]
            losses.append(nn.functional.cross_entropy(logits, wanted, reduction="none"))
        loss = torch.cat(losses).mean()
        factors = [value for name, value in parameters.items() if "lora_E" not in name]
        products = [f @ f.T if f.shape[0] == settings.init_r else f.T @ f for f in factors]
        regular = torch.stack([torch.norm(p - torch.eye(len(p)), p="fro") for p in products]).mean()
        (loss + settings.orth_reg_weight * regular).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    return parameters


def test_adalora_is_trained_as_peft_trains_it(tmp_path: Path) -> None:
    """Kills: gradients that are gone when they are weighed; a penalty or a mask that is left out; steps from 0."""
    theirs = fresh("ADALORA", total_step=STEPS, **SCHEDULE)
    loaded = tiny_loaded("llama")
    start = bridged("ADALORA", **SCHEDULE).attach(loaded, seed=1)
    theirs.load_state_dict(whole_of(start).state_dict(), strict=False)
    wanted = by_peft(theirs)
    adapter = tuned("ADALORA", tmp_path)
    found = trained_by(whole_of(adapter))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    kept = [int(value.count_nonzero()) for name, value in found.items() if "lora_E" in name]
    assert sum(kept) == 2 * len(kept), "the budget is target_r for each map"
    assert whole_of(adapter).peft_config["default"].total_step == STEPS
    with torch.no_grad():  # peft's own file has no rows without rank
        theirs.save_pretrained(tmp_path / "theirs")
        again = tiny_loaded("llama", tmp_path)
        other = load_adapter(again, tmp_path / "theirs")
        torch.testing.assert_close(answers(again), said_by(theirs.eval(), "ADALORA"), rtol=0, atol=1e-5)
        assert sum(len(value) for name, value in other.parameters.items() if "lora_E" in name) == sum(kept)
        save_adapter(other, tmp_path / "back")
        last = tiny_loaded("llama", tmp_path)
        load_adapter(last, tmp_path / "back")
        assert torch.equal(answers(last), answers(again))
    before = [value.clone() for value in other.parameters.values()]
    other.after_step(1, STEPS)
    assert all(map(torch.equal, before, other.parameters.values())), "what is read keeps its ranks"


@pytest.mark.parametrize("stop", [2, 8])
@pytest.mark.parametrize("kind", ["ADALORA", "VERA", "CPT"])
def test_a_stopped_run_continues_bit_for_bit(kind: str, stop: int, tmp_path: Path) -> None:
    """Kills: what the allocator remembers in no checkpoint; a pattern of ranks that is forgotten after the schedule."""
    whole = tuned(kind, tmp_path / "whole").parameters
    with pytest.raises(Stopped):
        tuned(kind, tmp_path / "broken", observers=[lambda r: r["step"] == stop and signal.raise_signal(15)])
    continued = tuned(kind, tmp_path / "broken", seed=2, resume=True).parameters
    if kind == "CPT":  # a table that is frozen is drawn from no seed
        assert len(whole) == 1
    assert all(torch.equal(whole[name], value) for name, value in continued.items())
    last = f"{STEPS:06d}"
    assert {name: data for name, data in lasting(tmp_path / "whole").items() if last in name or "metrics" in name} == {
        name: data for name, data in lasting(tmp_path / "broken").items() if last in name or "metrics" in name
    }


def test_a_run_too_short_for_its_schedule_is_told(tmp_path: Path) -> None:
    """Kills: a budget that is divided by no steps."""
    loaded = tiny_loaded("llama")
    adapter = bridged("ADALORA", tinit=3, tfinal=2).attach(loaded)
    with pytest.raises(ConfigError, match="leave none of 5 steps"):
        adapter.after_step(1, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_goes_through_a_run(kind: str, model: Path, tmp_path: Path) -> None:
    """Plan, training, report and the file. Kills: a type whose plan counts other parameters than the run has."""
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": f"say {n}", "input": "", "output": f"{n}."}) + "\n" for n in range(8))
    )
    config = build_config(
        {
            "model": str(model), "data": {"train": str(data), "max_length": 48}, "log": [],
            "method": bridged(kind).model_dump(), "train": {"steps": 2, "rows_per_step": 2},
            "precision": {"compute": "fp32"}, "out": str(tmp_path / "run"),
        }
    )  # fmt: skip
    run(config)
    loaded = load(str(model))
    adapter = load_adapter(loaded, tmp_path / "run")
    assert adapter.parameters
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record
