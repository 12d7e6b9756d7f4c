"""The blocks below all that trains: what they make of a document is the same in every epoch and is kept on the disk.

The one idea: a document's states are always those of the document run alone (or with others, where that gives the same
bits), so that they are the same whether they were read or made, whatever stood beside it and whenever a run was broken.
The file is `kept.py`; fused blocks look for a cut themselves (`blocks.py`), other modules run through `through`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.core.context import holding
from tunesmith.kernels.build import made_with
from tunesmith.models.copies import swap_of
from tunesmith.models.kept import KEY_BYTES, Kept
from tunesmith.models.ports import Port, is_watched
from tunesmith.models.shared import drops
from tunesmith.models.targets import block_number, block_paths

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.families import Family
    from tunesmith.models.load import Loaded

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """A forward pass that ends or begins within the model.

    Attributes:
        block: how many blocks are below the cut.
        states: what comes from there, [rows, tokens, width], and only what is above runs; None where only what is
            below runs, and its states are the answer.
        outputs: what a module of a block answers: 0 is a tensor, else a tuple of so many that begins with it.
        hear: is told `outputs` where only what is below runs, through modules.
        until: a pass that begins at the cut ends before this block, and the states there are the answer.
    """

    block: int
    states: Tensor | None = None
    outputs: int = 0
    hear: Callable[[int], None] = lambda outputs: None
    until: int | None = None

    @property
    def begin(self) -> int:
        """The first block that runs."""
        return 0 if self.states is None else self.block

    @property
    def end(self) -> int | None:
        """Behind the last block that runs; None where all that is above runs, too."""
        return self.block if self.states is None else self.until

    def enter(self) -> AbstractContextManager[None]:
        """Makes every forward pass within end or begin here."""
        return holding(_cut, self)


_cut: ContextVar[Cut | None] = ContextVar("tunesmith_cut", default=None)


def current_cut() -> Cut | None:
    """Where the forward pass ends or begins; None where it is whole."""
    return _cut.get()


class Trunk:
    """Keeps what comes out of the blocks that nothing trains in, while the model is in training mode.

    Args:
        folder: where the file is; made when needed, taken away by `remove`.
        budget: bytes of the file.
    """

    def __init__(self, loaded: Loaded, folder: Path, budget: int) -> None:
        self.model, self.family, self.fingerprint = loaded.model, loaded.family, loaded.fingerprint
        self.folder, self.budget = folder, budget
        self.kept: Kept | None = None
        self.begin(1)

    def begin(self, phase: int) -> None:
        """Looks again, at the next batch, for what is frozen: something else trains from now on."""
        self.close()
        self.phase, self.block, self.outputs = phase, -1, 0
        self.is_told = False

    def cut(self, batch: Batch, run: Callable[[Sequence[int]], Tensor], even: int | None = None) -> Cut | None:
        """What comes out of the trunk for a batch, states [1, tokens, width]; None where it has to run.

        Args:
            run: runs the trunk on some documents, by number, under a cut that `below` gives: [tokens of these, width].
            even: documents of so many tokens or more have the same bits together as alone; None where none has.
        """
        if not self.model.training:
            return None
        if self.block < 0:
            self._look()
        if not self.block:
            return None
        if self.kept is None:
            self.kept = self._open(_key(batch, 0, batch.lengths[0]), run([0]))
        if self.kept is None:
            return None
        states = torch.empty(batch.ids.numel(), self.kept.width, dtype=self.kept.dtype)
        parts, ends = states.split(list(batch.lengths)), accumulate(batch.lengths)
        keys = [_key(batch, end - len(part), end) for part, end in zip(parts, ends, strict=True)]
        missing = [row for row, key in enumerate(keys) if not self.kept.read(key, parts[row])]
        together = [row for row in missing if even is not None and batch.lengths[row] >= even]
        apart = [[row] for row in missing if row not in together]
        for rows in [together, *apart] if together else apart:
            made = run(rows).split([batch.lengths[row] for row in rows])
            for row, part in zip(rows, made, strict=True):
                parts[row].copy_(part)
                self.kept.write(keys[row], parts[row])
        self._tell(self.kept, len(missing))
        return Cut(self.block, states.to(batch.ids.device)[None], self.outputs)

    def below(self) -> Cut:
        """The cut under which only the trunk runs."""
        return Cut(self.block, hear=self._hear)

    def close(self) -> None:
        """Lets go of the file, which stays for a run that goes on."""
        if self.kept is not None:
            self.kept.close()
        self.kept = None

    def remove(self) -> None:
        """Takes the file away."""
        self.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def _path(self) -> Path:
        return self.folder / "trunk.bin"

    def _hear(self, outputs: int) -> None:
        self.outputs = outputs

    def _look(self) -> None:
        blocks = len(block_paths(self.model, self.family))
        self.block, why = frozen_blocks(self.model, self.family)
        if not self.block:
            log.info("train.cache_trunk: no states are kept: %s", why)
            self.remove()
            return
        told = ("all" if self.block == blocks else f"the lower {self.block} of", blocks, _size(self.budget))
        log.info("%s %d blocks are frozen: their states are kept on disk, at most %s", *told)

    def _open(self, key: bytes, first: Tensor) -> Kept | None:
        """The file, and in it nothing that a document does not give now. `first` is made whatever is kept."""
        if first.requires_grad:
            self.block = 0
            log.info("train.cache_trunk: no states are kept: something below trains")
            return None
        facts = {
            "format": FORMAT, "model": self.fingerprint, "block": self.block, "phase": self.phase,
            "torch": torch.__version__, "threads": torch.get_num_threads(), "kernels": made_with(),
            "device": first.device.type,
        }  # fmt: skip
        first = first.cpu().contiguous()
        kept = Kept(self._path, self.budget, facts, first.shape[1], first.dtype)
        held = torch.empty_like(first)
        if kept.read(key, held) and not torch.equal(held, first):
            log.warning("%s: not what this machine computes; it is begun anew", self._path)
            kept.clear()
        return kept

    def _tell(self, kept: Kept, made: int) -> None:
        """Says once, when a whole batch was there, what is kept."""
        if not made and not self.is_told:
            self.is_told = True
            told = (len(kept.places), _size(kept.bytes), _size(self.budget))
            log.info("states of %d rows are kept on disk, %s of at most %s", *told)


def frozen_blocks(model: nn.Module, family: Family) -> tuple[int, str]:
    """How many of the lowest blocks give a document the same states in every step; where none, why.

    Nothing trains, nothing is attached and no dropout acts in these and before them, and nobody listens there.
    """
    paths = block_paths(model, family)
    if not paths or not family.table or family.kind == "seq2seq":
        return 0, f"the blocks of {family.name} are not known to be one after the other"
    lowest, why, is_behind = len(paths), "", False
    for path, module in model.named_modules():
        number = block_number(family, path)
        is_behind = is_behind or number == len(paths) - 1
        if number >= lowest or (number < 0 and is_behind and _is_end(family, path)):
            continue
        reason = _changes(module)
        if reason:
            lowest, why = max(number, 0), f"{path or 'the model'} {reason}"
            if not lowest:
                break
    return lowest, why


def through(model: nn.Module, family: Family, call: Callable[[], Tensor]) -> Tensor:
    """What `call`, which runs the model's own modules, answers; under a cut, what is on its side of it."""
    cut = current_cut()
    if cut is None:
        return call()
    blocks = [model.get_submodule(path) for path in block_paths(model, family)[: cut.end]]
    states: Any = cut.states
    answer = (states, *[None] * (cut.outputs - 1)) if cut.outputs else states
    with _instead(blocks[: cut.begin], lambda *args, **kwargs: answer):
        return call() if cut.end is None else _reached(blocks[-1], call, cut)


def _reached(last: nn.Module, call: Callable[[], Tensor], cut: Cut) -> Tensor:
    """The states behind a block; nothing above it runs."""

    def ends(module: nn.Module, args: Any, answer: Any) -> None:
        raise _Reached(answer)

    # the last of its hooks: those of who gathers its weights have to run
    hook = last.register_forward_hook(ends)
    try:
        call()
    except _Reached as reached:
        cut.hear(reached.outputs)
        return reached.states
    finally:
        hook.remove()
    raise AssertionError("a model that does not run its blocks")


class _Reached(Exception):
    """The cut, with what the block below it answers."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.outputs = len(answer) if isinstance(answer, tuple) else 0
        self.states: Tensor = answer[0] if isinstance(answer, tuple) else answer


@contextmanager
def _instead(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Modules with another forward."""
    old = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, held in zip(modules, old, strict=True):
            if held is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = held


def _changes(module: nn.Module) -> str:
    """Why a module need not answer the same in every step; empty where it does."""
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return "trains"
    if isinstance(module, Port) or swap_of(module) is not None:
        return "has an adapter"
    if is_watched(module):
        return "is listened to"
    return "drops out" if drops(module) else ""


def _is_end(family: Family, path: str) -> bool:
    """Whether a module, or what it is in, comes after all blocks."""
    ends = (*family.outside.get("head", ()), *family.outside.get("norm", ()))
    within = path.split(".inserts")[0]
    return "embeddings" not in path and any(within == end or within.endswith("." + end) for end in ends)


def _key(batch: Batch, start: int, end: int) -> bytes:
    """Tells documents apart: all that their states depend on."""
    found = hashlib.blake2b(batch.ids[start:end].cpu().numpy().tobytes(), digest_size=KEY_BYTES)
    if batch.types is not None:
        found.update(b"types" + batch.types[start:end].cpu().numpy().tobytes())
    return found.digest()


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit / 10:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
