"""Checkpoints of a run of any layout: one process reads and writes them, whole, and all have their pieces.

The one idea: what is on the disk does not say how a run was spread, so that every layout and number of processes goes
on from it. Files are `checkpoint.py`'s; which part a process has is the layout's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import CheckpointError, ConfigError
from tunesmith.kernels.build import made_with
from tunesmith.train.checkpoint import MEMORY, MOMENTS, WEIGHTS, Checkpoint, Checkpoints, State
from tunesmith.train.optim import FIRST, SCALES, SECOND

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.parallel.layout import Layout
    from tunesmith.train.optim import Optimizer

log = logging.getLogger(__name__)


class Keeper:
    """The checkpoints in a run folder. Every process calls the same methods; only the first one sees files.

    Args:
        memory: what the method remembers from step to step, whole on every process.
    """

    def __init__(self, folder: Path, keep: int, layout: Layout, memory: Mapping[str, Tensor]) -> None:
        self.checkpoints = Checkpoints(folder / "checkpoints", keep)
        self.layout, self.world = layout, layout.world
        self.memory = {MEMORY + name: value for name, value in memory.items()}
        self.saved_step = -1
        self._found: Checkpoint | None = None

    def check_fresh(self) -> None:
        """Raises ConfigError where another run has left checkpoints."""
        self.world.first(self._check_fresh)

    def newest(self) -> dict[str, Any] | None:
        """Opens the newest complete checkpoint; its `state` and what is known of the process that wrote it.

        None where there is none. Raises CheckpointError.
        """
        return self.world.first(self._newest)

    def holds(self, step: int) -> bool:
        """Opens the checkpoint of a step; whether it is whole."""
        return self.world.first(lambda: self._holds(step))

    def read_weights(self, pieces: Mapping[str, Tensor]) -> None:
        """Fills every process's pieces from the checkpoint that is open."""
        room = self.layout.room(pieces)
        self.world.first(lambda: self._read(WEIGHTS, room))
        self.layout.deal(room, pieces)

    def read_moments(self, optimizer: Optimizer, steps: int) -> None:
        """Lets an optimizer go on after `steps` updates, and the method with what it remembered.

        After none there are no moments: every step so far was left out.
        """
        held = _kinds(optimizer.fresh() if steps else {})
        rooms = {kind: self.layout.room(moments) for kind, moments in held.items()}
        self.world.first(lambda: self._read(MOMENTS, _named(rooms) | self.memory))
        for kind, moments in held.items():
            self.layout.deal(rooms[kind], moments)
        self.world.same(self.memory.values())
        if steps:
            optimizer.restore(_named(held), steps)

    def save(self, state: State, pieces: Mapping[str, Tensor], optimizer: Optimizer, seconds: float) -> None:
        """A checkpoint of now; older ones go only once it is on the disk."""
        weights = self.layout.whole(pieces)
        moments = _named({kind: self.layout.whole(held) for kind, held in _kinds(optimizer.state()).items()})
        self.saved_step = state.step
        if self.world.is_first:
            self.checkpoints.save(state, weights, moments | self.memory, seconds)
            self.checkpoints.prune(state.best_step)

    def prune(self, best_step: int | None) -> None:
        """Removes what a process that died between saving and pruning has left."""
        if self.world.is_first:
            self.checkpoints.prune(best_step)

    def _check_fresh(self) -> None:
        if self.checkpoints.steps():
            where = str(self.checkpoints.folder)
            raise ConfigError("there are checkpoints of another run", where=where, hint="--resume")

    def _newest(self) -> dict[str, Any] | None:
        self.checkpoints.sweep()
        found = self._found = self.checkpoints.newest()
        if found is None:
            return None
        known = {name: getattr(found, name) for name in ("torch_version", "threads", "kernels", "elapsed_seconds")}
        return {"state": asdict(found.state), **known}

    def _holds(self, step: int) -> bool:
        try:
            self._found = self.checkpoints.load(step)
        except CheckpointError as error:
            log.warning("the best checkpoint is damaged, the last weights are the result: %s", error)
            return False
        return True

    def _read(self, file: str, into: Mapping[str, Tensor]) -> None:
        assert self._found is not None
        self._found.read(file, into)


def warn_of_changes(known: Mapping[str, Any]) -> None:
    """Says what last bits depend on and has changed since a checkpoint that `Keeper.newest` tells of was made."""
    if known["torch_version"] != torch.__version__:
        told = (known["torch_version"], torch.__version__)
        log.warning("the checkpoint is by torch %s, this is %s: results may differ in the last bits", *told)
    with_what = (known["kernels"], made_with())
    if known["kernels"] and len(set(with_what)) > 1:
        log.warning("the checkpoint was made with %s, this is %s: results may differ in the last bits", *with_what)


def _named(held: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by kind and name as `optim` has them: kind before name."""
    return {kind + name: value for kind, tensors in held.items() for name, value in tensors.items()}


def _kinds(moments: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same the other way round."""
    kinds: Iterable[str] = (FIRST, SECOND, SCALES + FIRST, SCALES + SECOND)
    return {
        kind: {name.removeprefix(kind): value for name, value in moments.items() if name.startswith(kind)}
        for kind in kinds
    }
