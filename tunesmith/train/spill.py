"""Activations on the disk: what a forward keeps for its backward waits in a file without a name, not in memory.

The one idea: autograd asks what to keep of a tensor and what that stands for (saved-tensor hooks), so that no model
knows of it. Whole storages are written, once, and come back with the strides they had: the gradients are the same bits.
Beside a model on an accelerator they wait in host memory. Masters and moments are `apart.py`'s.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tunesmith.core.files import os_error
from tunesmith.kernels.quantized import Quantized

LEAST_BYTES = 1 << 16  # smaller ones are not worth a call of the system

Opened = Any  # a file of bytes


class Spill:
    """Where the activations of a micro-batch wait.

    Args:
        model: what it holds stays in memory.
        folder: on the disk that takes them; the file is made when the first one comes.

    Attributes:
        most_bytes: written for one micro-batch, at most.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.most_bytes = self.now_bytes = 0
        self._file: Opened = None
        self._known: dict[int, tuple[weakref.ref[Any], int, _Waiting]] = {}
        self._stays: set[int] = set()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass within keeps its activations here until its backward; those of the one before are over."""
        held = (*self.model.parameters(), *self.model.buffers())
        self._stays = {_key(tensor) for tensor in held if not isinstance(tensor, Quantized)}
        self.now_bytes, self._known = 0, {}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self._known = {}

    def close(self) -> None:
        """Gives the room on the disk back."""
        if self._file is not None:
            self._file.close()
        self._file = None

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> Tensor | _View:
        if isinstance(tensor, nn.Parameter | Quantized) or _key(tensor) in self._stays:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST_BYTES:
            return tensor
        alive, version, waiting = self._known.get(storage._cdata, (None, -1, None))
        if waiting is None or alive is None or alive() is not storage or version != tensor._version:
            waiting = self._keep(tensor)
            self._known[storage._cdata] = (weakref.ref(storage), tensor._version, waiting)
        return _View(waiting, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _keep(self, tensor: Tensor) -> _Waiting:
        count, place = tensor.untyped_storage().nbytes(), self.now_bytes
        self.now_bytes += count
        self.most_bytes = max(self.most_bytes, self.now_bytes)
        if isinstance(tensor, FakeTensor):  # a plan counts and has nothing to keep
            return _Waiting(count, tensor.device)
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        if tensor.device.type != "cpu":
            return _Waiting(count, tensor.device, host=raw.cpu().pin_memory())
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            _write(self._file.fileno(), raw.numpy().data, place)
        except OSError as error:
            raise os_error(self.folder, error) from error
        return _Waiting(count, tensor.device, self._file, place)


@dataclass
class _Waiting:
    """A storage that waits: in a file at a place, or in host memory.

    Attributes:
        back: its bytes, while somebody who took them has them.
    """

    count: int
    device: torch.device
    file: Opened = None
    place: int = 0
    host: Tensor | None = None
    back: Callable[[], Any] = lambda: None

    def take(self) -> Tensor:
        """Its bytes: uint8 [count]."""
        storage = self.back()
        if storage is not None:
            return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        if self.host is not None:
            found = self.host.to(self.device)
        else:
            found = torch.empty(self.count, dtype=torch.uint8, device=self.device)
            if self.file is not None:
                _read(self.file.fileno(), found.numpy().data, self.place)
        self.back = weakref.ref(found.untyped_storage())
        return found


@dataclass(frozen=True)
class _View:
    """What a tensor is of a storage."""

    waiting: _Waiting
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


@torch.no_grad()
def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.waiting.take().view(kept.dtype).as_strided(kept.shape, kept.strides, kept.offset)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _write(handle: int, raw: memoryview, place: int) -> None:
    while raw:
        done = os.pwrite(handle, raw, place)
        raw, place = raw[done:], place + done


def _read(handle: int, raw: memoryview, place: int) -> None:
    while raw:
        done = os.preadv(handle, [raw], place)
        assert done, "a file without a name that somebody has cut"
        raw, place = raw[done:], place + done
