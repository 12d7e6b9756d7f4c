"""Layouts in which a process holds a part of the model compute what one process does."""

from __future__ import annotations

from pathlib import Path

import in_parts
import pytest
import torch
from in_parts import LAYOUTS, gradients
from safetensors.torch import load_file
from several import METHODS, launch

from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.world import ALONE

pytestmark = pytest.mark.slow
CASES = [(size, name) for size, held in LAYOUTS.items() for name in held]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What launches of two and of four processes leave."""
    found = tmp_path_factory.mktemp("parts")
    for size in LAYOUTS:
        for process in launch(found, size, script=in_parts.__file__):
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "name"), CASES)
def test_gradients_are_those_of_one_process(folder: Path, size: int, name: str, method: str) -> None:
    wanted = gradients(ALONE, LayoutSection(), method)
    found = load_file(folder / f"gradients-{name}-{method}.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = torch.linalg.vector_norm(found[key] - value) / torch.linalg.vector_norm(value).clamp(min=1e-30)
        assert error < 1e-6, (key, float(error))
