"""What a run writes is in its plan: keys and values, weights laid out for it, reward models, the work of rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_reward_models import folder, rewarded  # noqa: F401
from test_rollouts import config as rollout_config

from tunesmith.kernels.paged import PAGE as KERNEL_PAGE
from tunesmith.models.generate import generate
from tunesmith.models.load import load
from tunesmith.models.route import BASE
from tunesmith.models.running import Running
from tunesmith.plan.calibration import Calibration
from tunesmith.plan.shape import read_shape
from tunesmith.plan.writing import PAGE, Writing
from tunesmith.run.planning import plan_run
from tunesmith.run.prepare import prepare
from tunesmith.run.rollouts import AT_ONCE
from tunesmith.run.written import _ROLLOUT_ROWS, completions


def test_keys_and_values_are_those_that_writing_sets_aside(folder: Path, monkeypatch):  # noqa: F811
    """To the byte. Kills: keys without values; one page a row; all rows where fewer are written together."""
    writers: list[Running] = []
    monkeypatch.setattr(Running, "_settle", lambda self, inner=Running._settle: (writers.append(self), inner(self)))
    loaded, shape = load(folder / "model"), read_shape(folder / "model")
    prompts = [[5 + row] * (20 + 9 * row) for row in range(6)]
    writing = Writing(tuple(map(len, prompts)), 40, 4, 6 * 40, sum(map(len, prompts)))
    generate(loaded, BASE, prompts, max_new_tokens=40, stop_ids=set(), batch_size=4)
    held = sum(pages.keys.nbytes + pages.values.nbytes for pages in writers[-1].store)
    assert writing.cache_bytes(shape, 4) == held
    assert PAGE == KERNEL_PAGE


def test_a_plan_knows_how_many_are_written_together():
    assert _ROLLOUT_ROWS == AT_ONCE


def test_reward_models_and_the_work_of_rollouts_are_counted(folder: Path):  # noqa: F811
    """The adapter of the reward model with its head: float32, frozen. Kills: counting it as a second model, or not at
    all; a plan's work without what is written."""
    calibration = Calibration(1e9, 1e9, 1e-6)
    plain = {"kind": "grpo", "group": 4, "kl": 0.0, "reward": f"{folder}/own.py:one"}
    alone = plan_run(prepare(rollout_config(folder, plain, "alone")), calibration=calibration)
    judged = plan_run(prepare(rewarded(folder, "judged")), calibration=calibration)
    saved = [value for file in sorted((folder / "reward" / "adapter").glob("*.safetensors")) for value in _shapes(file)]
    assert judged.parameters.total - alone.parameters.total == sum(map(_count, saved))
    assert judged.parameters.trainable == alone.parameters.trainable
    assert judged.memory.weights_bytes - alone.memory.weights_bytes == 4 * sum(map(_count, saved))
    assert "score" in judged.memory.phases
    assert "score" not in alone.memory.phases
    prepared = prepare(rewarded(folder, "counted"))
    writing = completions(prepared)
    assert writing is not None
    assert writing.tokens == prepared.totals.rows * prepared.config.objective.answered
    assert alone.writing is not None
    assert alone.writing["tokens"] == writing.tokens
    assert alone.seconds is not None
    assert alone.seconds > alone.writing["seconds"] > 0
    assert judged.flops - alone.flops == pytest.approx(
        writing.judged_tokens * 2 * read_shape(folder / "model").matrix_parameters, rel=0.5
    )


def _shapes(file: Path):
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return [tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118


def _count(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
