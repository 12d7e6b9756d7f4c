"""Laws of attention within documents that hold in any precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.switches import without
from tunesmith.models.attention import attend
from tunesmith.models.route import Segments

torch.set_num_threads(1)
LENGTHS = (5, 1, 12)


def _drawn(dtype: torch.dtype) -> list[Tensor]:
    """Query of four heads, key and value of two: [1, heads, tokens, 8], of the same numbers in any dtype."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=draw).bfloat16().to(dtype).requires_grad_() for shape in shapes]


def _attended(inputs: list[Tensor], window: int | None) -> Tensor:
    module = nn.Module()
    module.is_causal = True
    with Segments(LENGTHS).enter():
        return attend(module, *inputs, None, scaling=0.3, sliding_window=window)[0]


@pytest.mark.parametrize("window", [None, 3])
def test_bfloat16_documents_attend_as_in_float32_and_are_rounded_once(window: int | None) -> None:
    """One by one on a CPU, scores, weights and gradients of short documents are made in float32. Kills: no widening."""
    narrow, wide = _drawn(torch.bfloat16), _drawn(torch.float32)
    with without("attention"):
        one, other = _attended(narrow, window), _attended(wide, window)
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, other.bfloat16())
    pull = torch.ones_like(one)
    one.backward(pull)
    other.backward(pull.float())
    for x, y in zip(narrow, wide, strict=True):
        assert torch.equal(x.grad, y.grad.bfloat16())
