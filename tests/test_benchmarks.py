"""What benchmarks count, and that the quick ones run from end to end."""

from __future__ import annotations

import pytest

from benchmarks.roofline import SHAPES, step_work
from tunesmith.plan.shape import read_shape

# GFLOP a token of LoRA of rank 16 on all maps, half of the tokens supervised, counted by hand:
# 4P, 6N_A, attention of rows of 195 and 2048 tokens, head, all together less what is spared
COUNTED = {
    "smollm2-135m": (0.425, 0.029, 0.024, 0.248, 0.057, 0.527, 0.751),
    "llama-1b": (3.892, 0.068, 0.045, 0.470, 0.525, 4.41, 4.83),
    "llama-8b": (27.917, 0.252, 0.179, 1.879, 1.051, 28.96, 30.66),
}


@pytest.mark.parametrize("model", COUNTED)
def test_the_floor_of_a_token_is_what_was_counted_by_hand(model: str) -> None:
    """Kills: 6 N_A as 4, attention as a full square, a head at all positions, or a trim left out."""
    maps, adapters, short, long, head, total, long_total = COUNTED[model]
    for length, attention, whole in ((195, short, total), (2048, long, long_total)):
        lengths = [length] * 4
        work = step_work(read_shape(SHAPES[model]), lengths, 2 * length, rank=16)
        found = (work.maps, work.adapters, work.attention, work.head, work.flops)
        each = [value / sum(lengths) / 1e9 for value in found]
        assert each == pytest.approx([maps, adapters, attention, head, whole], rel=6e-3, abs=5e-4)
