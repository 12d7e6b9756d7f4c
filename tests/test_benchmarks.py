"""What benchmarks count, and that the quick ones run from end to end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablate
from benchmarks.roofline import SHAPES, step_work
from benchmarks.rows import LENGTHS, prefixed, shaped
from tunesmith.core.switches import SAVINGS, on
from tunesmith.plan.shape import read_shape

pytestmark = pytest.mark.slow

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


def test_a_shared_beginning_counts_once() -> None:
    """Kills: a prefix that is counted for every row, and squares that still hold it."""
    shape = read_shape(SHAPES["smollm2-135m"])
    apart = [step_work(shape, [length], 50, rank=16) for length in (200, 100, 100)]
    together = step_work(shape, [300, 300], 100, rank=16, prefix=200)
    assert together.tokens == 400
    assert together.maps == sum(work.maps for work in apart)
    squares = 300**2 + 300**2 - 200**2
    assert together.attention == apart[0].attention * squares / 200**2


def test_full_tuning_has_half_as_much_again_in_its_maps() -> None:
    shape = read_shape(SHAPES["tiny"])
    lora, full = (step_work(shape, [64], 32, rank=rank) for rank in (4, 0))
    assert (full.maps / lora.maps, full.head / lora.head, full.adapters) == (1.5, 1.5, 0)


@pytest.mark.parametrize("name", LENGTHS)
def test_rows_are_as_long_as_they_are_drawn_and_half_of_them_is_supervised(name: str) -> None:
    """Kills: a row cut to the first real one, supervision at the front, a prefix that is learnt."""
    lengths = LENGTHS[name]
    real = ({"ids": list(range(10, 10 + count)), "supervised": [True] * count} for count in itertools.cycle((7, 90)))
    rows = list(itertools.islice(shaped(real, lengths, seed=1), 400))
    sizes = [len(row["ids"]) for row in rows]
    assert min(sizes) >= lengths.least
    assert max(sizes) <= lengths.most
    assert sorted(sizes)[200] == pytest.approx(lengths.median, rel=0.1)
    assert sum(map(sum, (row["supervised"] for row in rows))) / sum(sizes) == pytest.approx(0.5, abs=0.03)
    assert all(row["ids"][0] == 10 and not row["supervised"][0] and row["supervised"][-1] for row in rows)
    [first, second] = itertools.islice(prefixed(real, iter(rows), 20), 2)
    assert first["ids"][:20] == second["ids"][:20]
    assert not any(first["supervised"][:20])
    assert first["ids"][20:] == rows[0]["ids"]


def test_the_ablation_runs_every_way_on_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a learning rate other than 0 (losses drift apart), a way left out, switches that leak."""
    monkeypatch.setattr(ablate, "make_steps", lambda settings, folder: [[row(9), row(23)], [row(40), row(12)]])
    options = ablate.parse(["--model", "tiny", "--precision", "fp32", "--rounds", "1"])
    result = ablate.measure(options)
    assert list(result["ways"]) == list(ablate.ways())
    assert all(way["loss_gap"] < 1e-6 and way["norm_gap"] < 1e-5 for way in result["ways"].values())
    assert all(way["peak_bytes"] > 0 and way["time"]["median"] > 0 for way in result["ways"].values())
    assert all(on(name) for name in SAVINGS)
    assert ablate.table(result).count("\n") == len(result["ways"]) + 4


def test_shared_beginnings_are_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kills: counting under a mode that switches the sharing off."""
    rows = [{"ids": [*range(5, 105), at, at], "supervised": [False] * 101 + [True]} for at in range(4)]
    monkeypatch.setattr(ablate, "make_steps", lambda settings, folder: [rows])
    update, _ = ablate.prepare(ablate.parse(["--model", "tiny", "--rounds", "0"]), tmp_path)
    update(0)
    assert ablate.peak(update, (), 0) < 0.6 * ablate.peak(update, ("shared_prefix",), 0)


def row(length: int) -> dict[str, Any]:
    return {"ids": list(range(5, 5 + length)), "supervised": [False] * (length // 2) + [True] * (length - length // 2)}
