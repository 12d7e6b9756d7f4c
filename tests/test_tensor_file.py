"""Files of tensors that several processes fill are those that the safetensors library writes of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.parallel.pieces import runs_of_cut
from tunesmith.train.tensor_file import Part, TensorFile, create, kind_of, whole

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.int8, torch.float64, torch.float16)


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (), (0, 3), (11,), (2, 3, 4), (1,), (4, 4)]
    names = ["b", "a", "empty", "z/first.ä", "c.10", "c.9", "d"]
    return {
        name: (torch.rand(shape, generator=draw) * 100).to(dtype)
        for name, shape, dtype in zip(names, shapes, DTYPES, strict=True)
    }


def test_a_file_has_the_bytes_of_the_library_whoever_wrote_what(tmp_path: Path) -> None:
    """Parts of three processes. Kills: another order of tensors; offsets in numbers; a run that is put one too far."""
    held = tensors()
    save_file(held, tmp_path / "theirs")
    create(tmp_path / "ours", {name: kind_of(tensor) for name, tensor in held.items()})
    for rank in range(3):
        parts = {}
        for name, tensor in held.items():
            size = tensor.numel()
            run = (size * rank // 3, size * (rank + 1) // 3)
            parts[name] = Part(tensor.reshape(-1)[slice(*run)], kind_of(tensor), [run])
        TensorFile(tmp_path / "ours").write(parts)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    again = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    TensorFile(tmp_path / "theirs").read({name: whole(tensor) for name, tensor in again.items()})
    assert all(torch.equal(again[name], tensor) for name, tensor in held.items())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("within", [(0, 12), (1, 11), (5, 6), (3, 3)])
def test_runs_of_a_cut_tensor_are_where_its_numbers_are(tmp_path: Path, axis: int, within: tuple[int, int]) -> None:
    """Kills: rows taken for columns; a run that goes on over the end of its row."""
    tensor = torch.arange(24).view(4, 2, 3) if axis != 2 else torch.arange(24).view(2, 3, 4)
    for rank in range(2):
        wanted = tensor.chunk(2, axis)[rank].reshape(-1)[slice(*within)]
        runs = runs_of_cut(tensor.shape, axis, 2, rank, within)
        found = torch.cat([tensor.reshape(-1)[first:end] for first, end in runs]) if runs else tensor.new_empty(0)
        assert torch.equal(found, wanted)
        create(tmp_path / "file", {"x": kind_of(tensor)})
        TensorFile(tmp_path / "file").write({"x": Part(wanted.clone(), kind_of(tensor), runs)})
        written = load_file(tmp_path / "file")["x"].reshape(-1)
        assert written.sum() == wanted.sum()
        into = torch.zeros_like(wanted)
        TensorFile(tmp_path / "file").read({"x": Part(into, kind_of(tensor), runs)})
        assert torch.equal(into, wanted)
