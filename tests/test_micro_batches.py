"""A step is the same step however its rows share micro-batches: packed, padded or one by one, in a real architecture.

How rows are cut is tested with a toy model in `test_step`; here it is attention and positions that must not tell.
Gradients are compared as one vector, relative to its norm: a small tensor among them whose sums cancel shows the
order of float32 additions only. In float64 that noise is gone, and the bound is 1e-12.
"""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import disturb, families, one_document, tiny_batch, tiny_loaded

from tunesmith.adapt.lora import LoRA
from tunesmith.core.types import Batch
from tunesmith.models.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Single
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection
from tunesmith.train.step import accumulate

LENGTHS = (7, 3, 12, 4, 9, 2, 17, 5)
ROWS = tiny_batch(LENGTHS)
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "phi3", "opt"]


def micro_batches(rows: int) -> list[Batch]:
    """The eight rows, so many to a micro-batch."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    starts = [0, *ends]
    found = []
    for first in range(0, len(LENGTHS), rows):
        start, end = starts[first], ends[first + rows - 1]
        mine = (ROWS.sources >= start) & (ROWS.sources < end)
        names, lengths = ROWS.rows[first : first + rows], LENGTHS[first : first + rows]
        part = ROWS.ids[start:end], ROWS.positions[start:end]
        found.append(Batch(*part, lengths, ROWS.sources[mine] - start, ROWS.targets[mine], names))
    return found


def step(family: str, dtype: torch.dtype, batches: list[Batch], packed: bool) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step, the gradient as one vector in float64."""
    loaded = tiny_loaded(family, dtype=dtype)
    adapter = LoRA(rank=2, targets=("attn", "mlp")).attach(loaded)
    disturb(adapter)
    for parameter in adapter.parameters.values():
        parameter.data = parameter.data.to(dtype)
    precision = Precision(adapter.parameters, PrecisionSection(compute="fp32"))
    policy = Policy(loaded, adapter.route, packed=packed).train(True)
    loss = accumulate(SFT(), policy, batches, precision, Single())
    return loss, torch.cat([p.grad.flatten().double() for p in precision.masters.values() if p.grad is not None])


@functools.cache
def row_by_row(family: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    return step(family, dtype, [one_document(ROWS, index) for index in range(len(LENGTHS))], packed=True)


@pytest.mark.parametrize("family", families(*FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_rows_that_share_a_micro_batch_have_the_loss_and_gradient_of_rows_alone(
    family: str, dtype: torch.dtype, rows: int, packed: bool
) -> None:
    """Kills: attention over a neighbour's tokens; positions that run on, in either layout."""
    if (family, dtype, packed) == ("gemma2", torch.float64, False):
        dtype = torch.float32  # transformers' own attention of gemma2 takes its softmax in float32
    loss, gradient = row_by_row(family, dtype)
    other_loss, other_gradient = step(family, dtype, micro_batches(rows), packed)
    assert other_loss == pytest.approx(loss, rel=BOUNDS[dtype])
    assert float((other_gradient - gradient).norm() / gradient.norm()) <= BOUNDS[dtype]
