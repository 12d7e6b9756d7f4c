"""AdamW on named parameters, with its state as named tensors that a checkpoint can hold.

The arithmetic is torch's fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), in the dtype of
the masters. What is trained is decided by the caller: exactly the tensors given here. Moments of fewer bits are in
`compact.py`, moments outside memory in `apart.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError

if TYPE_CHECKING:
    from tunesmith.parallel.layout import Layout
    from tunesmith.train.apart import Room
    from tunesmith.train.section import TrainSection

BETAS = (0.9, 0.999)
EPS = 1e-8
FIRST, SECOND = "first/", "second/"
SCALES = "scales/"  # before the names of int8 moments (`compact.py`), of what their codes are multiplied by
_STATE = {FIRST: "exp_avg", SECOND: "exp_avg_sq"}


class Optimizer(Protocol):
    """What the trainer asks of an optimizer.

    Attributes:
        masters: what is trained, by name.
        updates: how many there were since the moments were fresh.
    """

    masters: dict[str, nn.Parameter]

    @property
    def updates(self) -> int: ...

    def step(self, lr: float) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def fresh(self) -> dict[str, Tensor]: ...

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None: ...


class AdamW:
    """Decoupled weight decay on everything that has two axes or more: not on norms, biases and gains.

    Args:
        masters: what is trained, by name. Raises AdapterError when there is nothing, or a tensor twice.
        lr_factors: what the learning rate of some of them is multiplied by, by name.
        matrices: names of those that are decayed; None looks at their axes. A layout may hand in parts, which are flat.
    """

    def __init__(
        self,
        masters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        lr_factors: Mapping[str, float] = MappingProxyType({}),
        matrices: Collection[str] | None = None,
    ) -> None:
        check_masters(masters)
        self.masters = dict(masters)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, master in masters.items():
            decay = weight_decay if (master.ndim >= 2 if matrices is None else name in matrices) else 0.0
            groups.setdefault((decay, lr_factors.get(name, 1.0)), []).append(master)
        self.inner = torch.optim.AdamW(
            [{"params": held, "weight_decay": decay, "lr_factor": factor} for (decay, factor), held in groups.items()],
            lr=0.0,
            betas=BETAS,
            eps=EPS,
            fused=True,
        )

    def step(self, lr: float) -> None:
        """One update with the gradients that the masters hold, at this rate times what each has as its factor."""
        for group in self.inner.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.inner.step()

    @property
    def updates(self) -> int:
        """How many there were since the moments were fresh."""
        return next((int(held["step"]) for held in self.inner.state.values()), 0)

    def state(self) -> dict[str, Tensor]:
        """Both moments of every tensor, by `first/NAME` and `second/NAME`. Empty before the first step."""
        return {
            kind + name: self.inner.state[master][key]
            for name, master in self.masters.items()
            if master in self.inner.state
            for kind, key in _STATE.items()
        }

    def fresh(self) -> dict[str, Tensor]:
        """Room for what `state` answers once there was a step."""
        return {kind + name: torch.empty_like(master) for name, master in self.masters.items() for kind in _STATE}

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Continues after `steps` updates whose moments these are. Raises KeyError for one that is missing."""
        for name, master in self.masters.items():
            kept = {key: moments[kind + name].to(master.device) for kind, key in _STATE.items()}
            self.inner.state[master] = {"step": torch.tensor(float(steps), device=master.device), **kept}


def check_masters(masters: Mapping[str, nn.Parameter]) -> None:
    """Raises AdapterError when there is nothing to train, or a tensor twice."""
    if not masters:
        raise AdapterError("nothing is trainable", where="method")
    if len({id(master) for master in masters.values()}) != len(masters):
        raise AdapterError("one tensor is declared trainable under two names", where="method")


def optimizer_for(
    masters: Mapping[str, nn.Parameter],
    settings: TrainSection,
    factors: Mapping[str, float],
    matrices: Collection[str] | None = None,
    room: Room | None = None,
    layout: Layout | None = None,
) -> Optimizer:
    """The optimizer that a `train:` section asks for; what it is made of as `AdamW` says.

    Args:
        room: where moments are kept apart (`apart.room_for`); None keeps them beside the masters.
        layout: whose pieces the masters are; None is one process.
    """
    more = {"weight_decay": settings.weight_decay, "lr_factors": factors, "matrices": matrices}
    if room is not None:
        from tunesmith.train.apart import ApartAdamW

        return ApartAdamW(masters, room, **more)  # type: ignore[arg-type]
    if settings.optimizer_state == "fp32":
        return AdamW(masters, **more)  # type: ignore[arg-type]
    from tunesmith.train.compact import CompactAdamW

    more |= {"seed": settings.seed, "layout": layout}
    return CompactAdamW(masters, settings.optimizer_state, **more)  # type: ignore[arg-type]
