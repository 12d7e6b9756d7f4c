"""Where the records of a run go: metrics.jsonl always, TensorBoard where asked.

A record is one flat dictionary a step. Its fields are the same bytes in every run of the same configuration,
but for those ending in `_seconds`, `_per_second` and `_bytes`. The live display is in `progress.py`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.files import os_error, strict_loads

log = logging.getLogger(__name__)


class MetricsLog:
    """Writes `metrics.jsonl`, one record a line, each on the disk's cache when `write` returns.

    Opening cuts off what is newer than `step`, and a last line that was not finished. A disk that is full costs
    records, with one warning, and never the run.

    Args:
        path: the file.
        step: the last step whose record stays; 0 starts the file anew.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._end = _end_of(path, step)
            if os.fstat(self._handle).st_size != self._end:
                os.ftruncate(self._handle, self._end)
        except OSError as error:
            raise os_error(path, error) from error
        self._warned = False

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; numbers that are not finite become null, which JSON can hold."""
        finite = {key: _json_value(value) for key, value in record.items()}
        line = (json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n").encode()
        try:
            if os.pwrite(self._handle, line, self._end) != len(line):
                raise OSError(28, "No space left on device")
            self._end += len(line)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._handle, self._end)  # no half line
            self._warn(error)

    def sync(self) -> None:
        """Flushes to the disk; a checkpoint is published only after its records."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("%s: %s; training goes on, records are missing", self.path, error.strerror)
        self._warned = True

    def close(self) -> None:
        os.close(self._handle)


def _end_of(path: Path, step: int) -> int:
    """Bytes of the records up to a step."""
    end = 0
    if step == 0:
        return end
    with open(path, "rb") as stream:
        for line in stream:
            try:
                found = strict_loads(line.decode("utf-8")).get("step") if line.endswith(b"\n") else None
            except (ValueError, AttributeError):
                found = None
            if not isinstance(found, int) or found > step:
                break
            end += len(line)
    return end


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Writes every number of a record under its own tag. Use it as an observer of the trainer.

    On a resumed run, steps past the resumed one that an earlier process wrote are hidden.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def __call__(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory used so far: of the accelerator, or resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
