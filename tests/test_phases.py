"""Phases: what trains when, fresh moments at the switch, and a resume that is bit-identical on both sides of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_loaded
from tiny_training import TinyTuned, lasting, run, settings

from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.lp_ft import LPFT
from tunesmith.adapt.method import Phase
from tunesmith.core.errors import AdapterError
from tunesmith.train.phases import span_of
from tunesmith.train.section import PrecisionSection

HEAD = frozenset({"head.weight"})
PROBE = (Phase(0.3, HEAD), Phase(1.0))
STEPS, SWITCH = 10, 3
SECTION = settings(steps=STEPS, save_every=1, keep=STEPS)


def phased(dtype: torch.dtype = torch.float32, phases: tuple[Phase, ...] = PROBE) -> TinyTuned:
    tuned: Any = TinyTuned(dtype=dtype, dropout=0.2)
    tuned.phases = phases
    return tuned


def trained(folder: Path, dtype: torch.dtype = torch.float32, *, resume: bool = False) -> dict[str, torch.Tensor]:
    """A run over both phases; the weights at its end."""
    tuned = phased(dtype)
    precision = PrecisionSection(compute="bf16" if dtype == torch.bfloat16 else "fp32")
    run(folder, SECTION, tuned=tuned, precision=precision, resume=resume)
    return {name: value.detach().clone() for name, value in tuned.parameters.items()}


def kept(folder: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / f"{file}.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_phase_trains_what_it_names_and_checkpoints_hold_everything(dtype: torch.dtype, tmp_path: Path) -> None:
    """Kills: a waiting parameter that moves, or is left out of checkpoints; moments for what does not train."""
    trained(tmp_path, dtype)
    start = {name: value.float() for name, value in TinyTuned(dtype=dtype, dropout=0.2).parameters.items()}
    for step in range(1, STEPS + 1):
        weights = kept(tmp_path, step, "weights")
        assert weights.keys() == start.keys()
        moved = {name for name, value in weights.items() if not torch.equal(value, start[name])}
        assert moved == (HEAD if step <= SWITCH else start.keys())
        names = {name.partition("/")[2] for name in kept(tmp_path, step, "moments")}
        assert names == (HEAD if step <= SWITCH else start.keys())


def test_moments_are_fresh_after_the_switch(tmp_path: Path) -> None:
    """After one step from zero, the second moment is a tenth of the first's square. Kills: moments that are kept."""
    trained(tmp_path)
    for step, fresh in {1: True, SWITCH: False, SWITCH + 1: True, SWITCH + 2: False}.items():
        moments = kept(tmp_path, step, "moments")
        first, second = moments["first/head.weight"], moments["second/head.weight"]
        assert torch.allclose(second, 0.1 * first**2, rtol=1e-4, atol=0) == fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_broken_on_either_side_of_the_switch_resumes_bit_identically(dtype: torch.dtype, tmp_path: Path) -> None:
    """Kills: a resumed run that starts in the first phase, or counts the moments' steps from the start of the run."""
    end = trained(tmp_path / "whole", dtype)
    for broken in (SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 3):
        folder = tmp_path / f"broken-{broken}"
        shutil.copytree(tmp_path / "whole", folder)
        for step in range(broken + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
        again = trained(folder, dtype, resume=True)
        assert all(torch.equal(again[name], value) for name, value in end.items())
        assert lasting(folder) == lasting(tmp_path / "whole")


def test_what_waits_is_asked_for_no_gradient(tmp_path: Path) -> None:
    """Kills: a probe that pays for a backward pass through everything."""
    tuned = phased()
    seen = []
    with watched(tuned, seen):
        run(tmp_path, SECTION, tuned=tuned)
    assert set(map(frozenset, seen[: 2 * SWITCH])) == {HEAD}
    assert set(map(frozenset, seen[3 * SWITCH :])) == {frozenset(tuned.parameters)}


@contextmanager
def watched(tuned: TinyTuned, seen: list[set[str]]) -> Iterator[None]:
    """Notes at every forward pass what asks for gradients."""
    losses = tuned.policy.token_losses

    def token_losses(batch: Any) -> torch.Tensor:
        seen.append({name for name, value in tuned.parameters.items() if value.requires_grad})
        return losses(batch)

    tuned.policy.token_losses = token_losses
    yield


def test_the_phase_is_a_function_of_the_step() -> None:
    """Kills: a share that no step belongs to, or the last step left over."""
    three = (Phase(0.3, HEAD), Phase(0.35, frozenset({"up.bias"})), Phase(1.0))
    spans = [span_of(three, ["head.weight", "up.bias"], step, 10) for step in range(1, 11)]
    assert [span.number for span in spans] == [1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert span_of(PROBE, HEAD, 1, 1).number == 2, "a run too short for a probe has none"
    with pytest.raises(AdapterError, match=r"phase 1 trains head.weight, which is not there"):
        span_of(PROBE, ["other"], 1, 10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_lp_ft_probes_the_head_and_unties_it(family: str) -> None:
    """Kills: a probe that moves the embedding because the head is the same tensor."""
    loaded = tiny_loaded(family)
    head, embedding = loaded.model.lm_head.weight, loaded.model.get_input_embeddings().weight
    before = sum(value.numel() for value in loaded.model.parameters())
    adapter = LPFT(probe=0.5).attach(loaded)
    assert [phase.until for phase in adapter.phases] == [0.5, 1.0]
    assert adapter.phases[0].names == {"lm_head.weight"}
    assert adapter.phases[1].names is None
    assert adapter.parameters["lm_head.weight"] is not embedding
    assert not loaded.model.config.tie_word_embeddings
    untied = head.numel() if head is embedding else 0
    assert sum(value.numel() for value in adapter.parameters.values()) == before + untied


def test_lp_ft_leaves_other_adapters_their_base() -> None:
    loaded = tiny_loaded("llama")
    LoRA(rank=2).attach(loaded, "first")
    with pytest.raises(AdapterError, match="lp_ft changes the base below the adapter first"):
        LPFT().attach(loaded)
