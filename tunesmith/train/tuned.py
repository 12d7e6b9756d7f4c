"""What goes into the trainer and what comes out of it. The loop between the two is `trainer.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.core.types import Batch


class TrainablePolicy(Protocol):
    """A policy whose dropout can be switched.

    Attributes:
        model: what it computes with.
    """

    @property
    def model(self) -> nn.Module: ...

    def token_losses(self, batch: Batch) -> Tensor: ...

    def scores(self, batch: Batch) -> Tensor: ...

    def reference_losses(self, batch: Batch) -> Tensor: ...

    def valued(self, batch: Batch) -> tuple[Tensor, Tensor]: ...

    def at(self, temperature: float) -> Any: ...

    def taught(self, batch: Batch, distance: Any, hard: float) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...


class Tuned(Protocol):
    """A model with something trainable on it.

    Attributes:
        parameters: all that is trained, by name, sorted; each tensor once.
        policy: the model as objectives see it.
        phases: parts of the run in which different parameters train (`adapt.method.Phase`); without the attribute, or
            where it is empty, all train from the first step to the last.
        lr_factors: what the learning rate of some parameters is multiplied by, by name; without the attribute, or
            where it is empty, all have the same.
        memory: tensors that its method remembers from step to step, by name; saved in every checkpoint.
        on_phase: told the number of a phase, from 1, when it is known what trains; without the attribute nobody is.
        stored: the numbers that a parameter was rounded from, by name, as `models.stored.Stored.finer` answers; without
            the attribute, or where it answers None, masters start from the parameters.
        penalty, after_step: of `adapt.adapter.Adapter`, with `memory` or without any of them.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]: ...

    @property
    def policy(self) -> TrainablePolicy: ...


@dataclass(frozen=True)
class Result:
    """How a run ended. The weights of `tuned` are then those of `weights_step`.

    Attributes:
        step: updates done.
        reason: steps, epochs, minutes, tokens or stop.
        weights_step: the step whose weights are the result: the best one when there is a metric to stop on.
        best_value: of that metric, None without one.
        tokens, supervised_tokens, rows: consumed.
        dropped: rows that were met and left out, by reason.
        seconds: over all processes of the run.
        peak_bytes: most memory used by a process.
        resumed_step: where this process began; 0 at the start.
        ranks: bytes that each process held of every part in its first step, gradients at the end of the backward, and
            the most memory it used; of several, also what each has sent. By rank.
    """

    step: int
    reason: str
    weights_step: int
    best_value: float | None
    tokens: int
    supervised_tokens: int
    rows: int
    dropped: dict[str, int]
    seconds: float
    peak_bytes: int
    resumed_step: int
    ranks: list[dict[str, Any]]
