"""Checkpoints of a run of any layout: every process writes and reads its own pieces, behind the training.

The one idea: what is on the disk does not say how a run was spread, so that every layout and number of processes goes
on from it. The state is copied between two steps and written by a thread; what the processes have to agree on, they
agree on between steps, too. Files are `checkpoint.py`'s and `tensor_file.py`'s; what a process has is the layout's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import CheckpointError, ConfigError, PeerError, ResourceError
from tunesmith.core.moments import COPIED_BYTES, blocks_of
from tunesmith.kernels.build import made_with
from tunesmith.train.checkpoint import MEMORY, MOMENTS, WEIGHTS, Checkpoint, Checkpoints, State, read_parts, write_parts
from tunesmith.train.optim import FIRST, SCALES, SECOND
from tunesmith.train.tensor_file import Kind, Part, kind_of, whole

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.parallel.layout import Layout
    from tunesmith.train.optim import Optimizer

log = logging.getLogger(__name__)

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Keeper:
    """The checkpoints in a run folder, which every process sees. All call the same methods.

    Args:
        memory: what the method remembers from step to step, whole on every process.
    """

    def __init__(self, folder: Path, keep: int, layout: Layout, memory: Mapping[str, Tensor]) -> None:
        self.checkpoints = Checkpoints(folder / "checkpoints", keep)
        self.layout, self.world = layout, layout.world
        self.memory = {MEMORY + name: value for name, value in memory.items()}
        self.saved_step = -1
        self._opened = Path()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # the checkpoint that is being written: its folder and step, what the thread does, and what it does then
        self._draft: Path | None = None
        self._step = -1
        self._doing: Future[None] | None = None
        self._next: Callable[[], None] | None = None

    def check_fresh(self) -> None:
        """Raises ConfigError where another run has left checkpoints."""
        self.world.first(self._check_fresh)

    def newest(self) -> dict[str, Any] | None:
        """Opens the newest complete checkpoint; its `state` and what is known of the process that wrote it.

        None where there is none. Raises CheckpointError.
        """
        return self._open(self._newest)

    def holds(self, step: int) -> bool:
        """Opens the checkpoint of a step; whether it is whole."""
        return self._open(lambda: self._load(step)) is not None

    def read_weights(self, pieces: Mapping[str, Tensor]) -> None:
        """Fills every process's pieces from the checkpoint that is open."""
        self._read(WEIGHTS, *self._parts({"": pieces}))

    def read_moments(self, optimizer: Optimizer, steps: int) -> None:
        """Lets an optimizer go on after `steps` updates, and the method with what it remembered.

        After none there are no moments: every step so far was left out.
        """
        moments = optimizer.fresh() if steps else {}
        self._read(MOMENTS, *self._parts(_kinds(moments), self.memory))
        if steps:
            optimizer.restore(moments, steps)

    def save(self, state: State, pieces: Mapping[str, Tensor], optimizer: Optimizer, seconds: float) -> None:
        """Begins a checkpoint of now, once the one before is on the disk.

        A state that lies on the CPU and is large is no second time in its memory: it is written before this returns.
        """
        self.go_on(wait=True)
        files = {
            WEIGHTS: self._parts({"": pieces}, kept=True),
            MOMENTS: self._parts(_kinds(optimizer.state()), self.memory, kept=True),
        }
        name = self.world.first(lambda: self._begin(state, {file: kinds for file, (kinds, _) in files.items()}))
        work = self.checkpoints.folder / name
        mine = {file: parts for file, (_, parts) in files.items()}
        behind = self.world.most(_on_cpu_bytes(mine)) <= COPIED_BYTES
        if behind:
            mine = {file: {name: part.copied() for name, part in parts.items()} for file, parts in mine.items()}
        step, best = state.step, state.best_step

        def write() -> None:
            for file, parts in mine.items():
                write_parts(work / file, parts)

        def publish() -> None:
            if self.world.is_first:
                self.checkpoints.publish(work, step, seconds)
                self.checkpoints.prune(best)

        self._doing, self._next, self._step = self._thread.submit(write), publish, step
        if not behind:
            self.go_on(wait=True)

    def go_on(self, wait: bool = False) -> None:
        """Between two steps: does for the checkpoint that is being written what can be done now.

        Args:
            wait: until it is on the disk. Raises ResourceError where it cannot be.
        """
        while self._doing is not None and (wait or not self.world.most(not self._doing.done())):
            self._advance()

    def close(self) -> None:
        """Leaves nothing half written behind, whatever has ended the run."""
        with suppress(ResourceError):  # that ends the run is told already
            if self.world.size == 1:  # several may not all be here
                self.go_on(wait=True)
        self._thread.shutdown()
        if self._draft is not None:
            self.checkpoints.discard(self._draft)

    def prune(self, best_step: int | None) -> None:
        """Removes what a process that died between saving and pruning has left."""
        if self.world.is_first:
            self.checkpoints.prune(best_step)

    def _begin(self, state: State, kinds: Mapping[str, Mapping[str, Kind]]) -> str:
        self._draft = self.checkpoints.draft(state, kinds)
        return self._draft.name

    def _advance(self) -> None:
        """Once all have written, the first process publishes; once it has, the checkpoint is there."""
        assert self._doing is not None
        doing, self._doing = self._doing, None
        error = doing.exception()
        told = self.world.named(str(error or ""))  # nobody goes on before all are here
        if error is not None:
            raise error
        if told:
            raise PeerError(PeerError.told(told), hint=PeerError.HINT)
        if self._next is None:
            self._draft, self.saved_step = None, self._step
            return
        self._doing, self._next = self._thread.submit(self._next), None

    def _parts(
        self, kinds: Mapping[str, Mapping[str, Tensor]], memory: Mapping[str, Tensor] = _NOTHING, kept: bool = False
    ) -> tuple[dict[str, Kind], dict[str, Part]]:
        """All whole tensors, and what this process has of them.

        Args:
            kinds: pieces, or moments of pieces, by what is put before their names.
            memory: what is whole on every process.
            kept: only what a checkpoint has from this process.
        """
        wholes = {name: kind_of(tensor) for name, tensor in memory.items()}
        parts = {name: whole(tensor) for name, tensor in memory.items() if self.world.is_first or not kept}
        for before, held in kinds.items():
            # scales lie as the blocks of their codes do
            is_scale, codes = before.startswith(SCALES), kinds[before.removeprefix(SCALES)]
            for name, (dtype, shape) in self.layout.wholes({name: codes[name] for name in held}).items():
                blocks = blocks_of(0, torch.Size(shape).numel())[1]
                wholes[before + name] = Kind(torch.float32, (blocks,)) if is_scale else Kind(dtype, shape)
            for name, tensor in held.items():
                if self.layout.keeps(name) or not kept:
                    runs = self.layout.runs(name, codes[name])
                    runs = [blocks_of(*run) for run in runs] if is_scale else runs
                    parts[before + name] = Part(tensor, wholes[before + name], runs)
        return wholes, parts

    def _read(self, file: str, kinds: Mapping[str, Kind], parts: Mapping[str, Part]) -> None:
        self.world.in_turn(lambda: read_parts(self._opened / file, kinds, parts))

    def _open(self, made: Callable[[], Checkpoint | None]) -> dict[str, Any] | None:
        """Opens a checkpoint on every process; the first one has looked at each of its bytes."""
        known: dict[str, Any] | None = self.world.first(lambda: _facts(made()))
        if known is not None:
            self._opened = self.checkpoints.path(known["state"]["step"])
        return known

    def _check_fresh(self) -> None:
        if self.checkpoints.steps():
            where = str(self.checkpoints.folder)
            raise ConfigError("there are checkpoints of another run", where=where, hint="--resume")

    def _newest(self) -> Checkpoint | None:
        self.checkpoints.sweep()
        return self.checkpoints.newest()

    def _load(self, step: int) -> Checkpoint | None:
        try:
            return self.checkpoints.load(step)
        except CheckpointError as error:
            log.warning("the best checkpoint is damaged, the last weights are the result: %s", error)
            return None


def warn_of_changes(known: Mapping[str, Any]) -> None:
    """Says what last bits depend on and has changed since a checkpoint that `Keeper.newest` tells of was made."""
    if known["torch_version"] != torch.__version__:
        told = (known["torch_version"], torch.__version__)
        log.warning("the checkpoint is by torch %s, this is %s: results may differ in the last bits", *told)
    with_what = (known["kernels"], made_with())
    if known["kernels"] and len(set(with_what)) > 1:
        log.warning("the checkpoint was made with %s, this is %s: results may differ in the last bits", *with_what)


def _facts(found: Checkpoint | None) -> dict[str, Any] | None:
    if found is None:
        return None
    known = {name: getattr(found, name) for name in ("torch_version", "threads", "kernels", "elapsed_seconds")}
    return {"state": asdict(found.state), **known}


def _on_cpu_bytes(files: Mapping[str, Mapping[str, Part]]) -> int:
    """What copies would take of the memory that training has."""
    held = (part.held for parts in files.values() for part in parts.values())
    return sum(tensor.nbytes for tensor in held if tensor.device.type == "cpu")


def _kinds(moments: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Moments by what `optim` puts before their names."""
    kinds: Iterable[str] = (FIRST, SECOND, SCALES + FIRST, SCALES + SECOND)
    return {
        kind: {name.removeprefix(kind): value for name, value in moments.items() if name.startswith(kind)}
        for kind in kinds
    }
