"""Tensors in a file beside the run instead of in memory: ordinary to read and write, resident only while touched.

The one idea: the file is mapped and has no name, so that `let_go` takes pages out of resident memory without losing a
number, and whatever ends the process leaves nothing behind. After ZeRO-Infinity (Rajbhandari et al. 2021, arXiv
2104.07857), which keeps the state of an optimizer on disks. Who lives here: masters and moments (`apart.py`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.core.files import os_error

_PAGE = mmap.PAGESIZE
_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by their first address


def mapped(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """float32 zeros of these shapes, by name, in one file that goes with the last of them.

    All of its bytes are reserved now. Raises ResourceError where the disk of `folder` has no room for them.
    """
    sizes = {name: -(-4 * torch.Size(shape).numel() // _PAGE) * _PAGE for name, shape in shapes.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # a mapped page that finds no room when it is written back would kill the process without a word
            os.posix_fallocate(file.fileno(), 0, max(_PAGE, sum(sizes.values())))
            held = mmap.mmap(file.fileno(), 0)
    except OSError as error:
        raise os_error(folder, error) from error
    whole = torch.frombuffer(held, dtype=torch.uint8)
    _maps[whole.data_ptr()] = held
    found, start = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        room = torch.frombuffer(held, dtype=torch.float32, count=count, offset=start) if count else torch.empty(0)
        found[name], start = room.view(tuple(shape)), start + sizes[name]
    return found


def let_go(tensor: Tensor) -> None:
    """Takes the pages of a contiguous tensor that lies in a mapped file out of memory; does nothing to any other."""
    if tensor.device.type != "cpu":
        return
    for address, held in _maps.items():
        start = tensor.data_ptr() - address
        if 0 <= start < len(held):
            first = start // _PAGE * _PAGE
            held.madvise(mmap.MADV_DONTNEED, first, start + tensor.nbytes - first)
