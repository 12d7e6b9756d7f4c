"""The fullest moment of training: which micro-batch, and what is there beside its activations.

The one idea: a micro-batch that is a little smaller but meets the gradients of those before it, or the moments of
earlier steps, can be the peak. One of each kind is known; those that cannot win by their size are not traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.plan.memory import Memory, Parts

if TYPE_CHECKING:
    from tunesmith.plan.foreseen import Met
    from tunesmith.plan.trace import Traced


@dataclass(frozen=True)
class Moment:
    """A micro-batch that was traced.

    Attributes:
        traced: what it does.
        forward, backward: bytes by part when all tensors take most, during each.
        learnt_tokens: of it.
    """

    traced: Traced
    forward: Parts
    backward: Parts
    learnt_tokens: int

    @property
    def peak_bytes(self) -> int:
        return max(sum(self.forward.values()), sum(self.backward.values()))

    def line(self) -> tuple[Parts, ...]:
        """Bytes by part while it runs: forward, then backward."""
        # gradients of an earlier micro-batch are there all along; else they come one by one
        before = self.forward["gradients"]
        return tuple(
            {**self.forward, "gradients": before or finished, "activations": activations}
            for activations, finished in self.traced.line
        )


@dataclass(frozen=True)
class Moments:
    """Micro-batches of which one is the fullest moment.

    Attributes:
        state: what does not depend on the batch.
        trace: runs one without data.
        met: at least one.
    """

    state: Memory
    trace: Callable[[Met], Traced]
    met: Sequence[Met]

    def fullest(self) -> Moment:
        """The moment in which tensors take most."""
        best, scale = None, 1.0
        for one in sorted(self.met, key=lambda one: -self._most(one, 1.0)):
            if best is not None and self._most(one, scale) <= best.peak_bytes:
                continue
            found = self._moment(one)
            if best is None:
                scale = found.traced.activations_bytes / max(1, one.size_bytes)
            if best is None or found.peak_bytes > best.peak_bytes:
                best = found
        assert best is not None
        return best

    def _most(self, one: Met, scale: float) -> float:
        """What it can come to: all gradients are there at once with it."""
        state = {**self._state(one), "gradients": self.state.gradients_bytes}
        return sum(state.values()) + scale * one.size_bytes

    def _state(self, one: Met) -> Parts:
        state = self.state
        return {
            "weights": state.weights_bytes,
            "master": state.master_bytes,
            "optimizer": one.has_moments * state.optimizer_bytes,
            "gradients": one.has_gradients * state.gradients_bytes,
        }

    def _moment(self, one: Met) -> Moment:
        there, traced = self._state(one), self.trace(one)
        forward = {**there, "activations": traced.forward_peak_bytes}
        if one.has_gradients:
            backward = {**there, "activations": traced.activations_bytes}
        else:
            others = traced.peak_bytes - traced.finished_bytes
            backward = {**there, "gradients": traced.finished_bytes, "activations": others}
        return Moment(traced, forward, backward, len(one.seen.batch.sources))
