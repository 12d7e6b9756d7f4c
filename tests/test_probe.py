"""What is faster now is found by trying, and what people ask for stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tunesmith.core.section import Section
from tunesmith.train import probe
from tunesmith.train.precision import resolve
from tunesmith.train.section import PrecisionSection


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in probe.ASKED:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "chosen", "gain"),
    [
        ({1: 8.0, 2: 4.2, 4: 2.4}, 4, 8 / 2.4),  # quiet
        ({1: 8.0, 2: 4.2, 4: 9.0}, 2, 8 / 4.2),  # neighbours on half of the cores
        ({1: 8.0, 2: 40.0, 4: 80.0}, 1, 1.0),  # busy
        ({1: 8.0, 2: 7.9, 4: 7.8}, 1, 1.0),  # not worth a core
    ],
)
def test_the_fastest_number_of_threads_is_chosen(
    seconds: dict[int, float], chosen: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_seconds", lambda tensors: seconds[torch.get_num_threads()])
    assert probe.choose_threads() == pytest.approx(gain)
    assert torch.get_num_threads() == chosen


def test_a_number_that_the_environment_asks_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(probe, "_seconds", lambda tensors: float(torch.get_num_threads()))
    assert probe.choose_threads() == 1.0
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("has", "times", "found"),
    [
        (True, {torch.float32: 2.0, torch.bfloat16: 1.0}, "bf16"),
        (True, {torch.float32: 1.0, torch.bfloat16: 2.0}, "fp32"),
        (False, {torch.float32: 2.0, torch.bfloat16: 1.0}, "fp32"),
    ],
)
def test_auto_is_what_multiplies_faster(
    has: bool, times: dict[torch.dtype, float], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_has_bf16", lambda: has)
    monkeypatch.setattr(probe, "_seconds", lambda tensors: times[tensors[0].dtype])
    probe.is_bf16_faster.cache_clear()
    section: Section = PrecisionSection()
    assert resolve(section) == found  # type: ignore[arg-type]
    probe.is_bf16_faster.cache_clear()
