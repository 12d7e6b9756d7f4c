"""What a run keeps outside the memory that its model computes in, as `train.offload` says, and for how long.

The one idea: the trainer asks where masters and moments go and makes its forward passes under a context; what is kept
in memory answers the same questions. How it is done stands in `apart.py` and `spill.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.train.apart import Room, room_for
from tunesmith.train.spill import Spill

if TYPE_CHECKING:
    import torch

    from tunesmith.train.tuned import TrainablePolicy


class Offload:
    """The offloading of one process of a run.

    Args:
        what: as `train.offload` has it.
        policy: whose model's activations they are.
        folder: of the run; the files made in it have no names.

    Attributes:
        room: where masters and moments are kept apart; None where they stay in memory.
        spill: where activations wait; None where they stay in memory.
    """

    def __init__(self, what: str, policy: TrainablePolicy, device: torch.device, folder: Path) -> None:
        self.room: Room | None = room_for(device, folder) if what == "optimizer" else None
        self.spill = Spill(policy.model, folder) if what == "activations" else None

    def forward(self) -> AbstractContextManager[None]:
        """What a forward pass whose backward follows it runs in."""
        return nullcontext() if self.spill is None else self.spill.forward()

    @property
    def spilled_bytes(self) -> int:
        """Of the activations that waited outside at once, at most."""
        return self.spill.most_bytes if self.spill else 0

    def close(self) -> None:
        """Gives the room on the disk back."""
        if self.spill is not None:
            self.spill.close()
