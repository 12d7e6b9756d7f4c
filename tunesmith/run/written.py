"""What a run has its model write, as a plan needs it: completions that it learns from, answers that are judged."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from tunesmith.core.switches import on
from tunesmith.data.encode import Example
from tunesmith.data.pack import Cursor
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.rewards import open_rewards
from tunesmith.evaluate.rewards.trained import Trained
from tunesmith.objectives.sampled import Sampled
from tunesmith.plan.writing import Writing
from tunesmith.run.prepare import Prepared

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.plan.calibration import Calibration
    from tunesmith.plan.plan import Plan
    from tunesmith.plan.shape import ModelShape

LOOKED_AT = 16  # rollouts whose prompts are looked at
# as `run.rollouts` and `models.generate` have them, whose imports take torch
_ROLLOUT_ROWS, _EXAM_ROWS = 64, 16


def completions(prepared: Prepared) -> Writing | None:
    """Completions that the run learns from, each as long as it may be; None where it writes none."""
    objective = prepared.config.objective
    if not isinstance(objective, Sampled):
        return None
    steps = islice(prepared.stream(Cursor()), LOOKED_AT)
    rollouts = [[len(prompt.ids) for rows in step.micro_batches for prompt in rows] for step in steps]
    # the rollout with the longest prompts; each prompt is read once for all its completions
    longest = sorted(max(rollouts, key=lambda lengths: sorted(lengths, reverse=True)), reverse=True)
    written = prepared.totals.rows / objective.passes
    mean = sum(map(sum, rollouts)) / max(1, sum(map(len, rollouts)))
    return Writing(
        tuple(length for length in longest for _ in range(objective.completions)),
        objective.max_new_tokens,
        _ROLLOUT_ROWS,
        round(written * objective.max_new_tokens),
        round(written / objective.completions * mean),
        judged=(objective.has_values or objective.needs_old) + bool(objective.kl) + len(reward_runs(prepared)),
        learnt=True,
    )


def answers(prepared: Prepared) -> Writing | None:
    """Answers that are judged before and after training; None where none are written."""
    section, held = prepared.config.evaluate, prepared.eval
    spoken = [name for name in section.metrics if METRICS.load(name).needs != "losses"]
    if held is None or prepared.problem is not None or prepared.config.objective.compares or not spoken:
        return None
    rows = [row for place in list(held.places())[: section.rows] if isinstance(row := held.example(*place), Example)]
    prompts = [next((at for at, learnt in enumerate(row.supervised) if learnt), len(row.ids)) for row in rows]
    shots = section.shots * prepared.train_statistics.tokens // max(1, prepared.train_statistics.kept)
    times = 3 if shots else 2  # with solved examples, too
    if not prompts:
        return None
    return Writing(
        tuple(prompt + shots for prompt in prompts),
        section.generate,
        _EXAM_ROWS,
        times * len(prompts) * section.generate,
        times * sum(prompts) + shots * len(prompts),
    )


def reward_runs(prepared: Prepared) -> list[Trained]:
    """The reward models that judge completions."""
    objective = prepared.config.objective
    if not isinstance(objective, Sampled):
        return []
    return [reward for reward in open_rewards(objective.reward) if isinstance(reward, Trained)]


def beside(prepared: Prepared) -> nn.ParameterList:
    """What stands on the model beside what trains, frozen, on meta: the adapter that the run begins with, those of
    reward models with their heads; in float32, as adapters are held."""
    import torch
    from safetensors import safe_open
    from torch import nn

    folders = [*([prepared.start] if prepared.start else []), *(reward.adapter for reward in reward_runs(prepared))]
    found = nn.ParameterList()
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        found.extend(nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False) for shape in shapes)
    return found


def score_bytes(prepared: Prepared, policy: Policy) -> int:
    """Activations of the completions that a reward model reads at once, as long as they may be; 0 without one."""
    from tunesmith.evaluate.losses import BATCH_TOKENS
    from tunesmith.models.route import BASE
    from tunesmith.plan.foreseen import Seen
    from tunesmith.plan.trace import sample_batch, trace_evaluation

    writing = completions(prepared)
    if writing is None or not reward_runs(prepared):
        return 0
    longest = max(writing.prompts) + writing.limit
    rows = Seen(sample_batch([longest] * max(1, min(len(writing.prompts), BATCH_TOKENS // longest))))
    return trace_evaluation(policy.model, policy.under(BASE).hidden, rows).activations_bytes


def with_written(
    plan: Plan, prepared: Prepared, loaded: Loaded, calibration: Calibration | None, score_bytes: int
) -> Plan:
    """A plan with what its run writes.

    Args:
        score_bytes: as above.
    """
    from tunesmith.plan.shape import read_shape
    from tunesmith.plan.writing import with_writing, writing_seconds
    from tunesmith.train.precision import resolve

    shape, item_bytes = read_shape(prepared.folder), loaded.model.dtype.itemsize
    for writing in filter(None, (completions(prepared), answers(prepared))):
        laid = replace(writing, laid_bytes=_laid_bytes(prepared, loaded, writing, shape))
        seconds = None
        if calibration is not None and writing.learnt:
            seconds = writing_seconds(writing, shape, calibration, resolve(prepared.config.precision))
        plan = with_writing(plan, laid, shape, item_bytes, seconds)
    if not score_bytes:
        return plan
    memory = plan.memory
    phase = {**memory.phases["save"], "activations": score_bytes}
    peak = max(memory.peak_bytes, sum(phase.values()))
    return replace(plan, memory=replace(memory, peak_bytes=peak, phases={**memory.phases, "score": phase}))


def _laid_bytes(prepared: Prepared, loaded: Loaded, writing: Writing, shape: ModelShape) -> int:
    """Of weights that are laid out for products of so many rows; twice, where the first such products do without tiles
    and the others have them (`models.running`)."""
    from tunesmith.kernels import few
    from tunesmith.kernels.packed import can_tile
    from tunesmith.models.decode import may_pack
    from tunesmith.models.forms import form_of

    dtype, held_as_codes = loaded.model.dtype, prepared.config.precision.base not in ("same", "bf16")
    in_pages = on("paged") and form_of(loaded.model) is not None
    if held_as_codes or not in_pages or writing.rows <= few.MOST.get(dtype, 0) or not may_pack(loaded.model):
        return 0
    copies = 2 if can_tile(dtype) else 1
    return copies * dtype.itemsize * (shape.matrix_parameters + shape.head_parameters)
