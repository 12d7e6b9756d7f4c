"""Phases of a run in which different parameters train: which one a step is of, and what trains then.

The one idea: the phase is a pure function of (step, steps in all), so that a resumed run is in the right one. Every
phase begins with fresh moments; what waits is saved in every checkpoint all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.core.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.adapt.method import Phase


@dataclass(frozen=True)
class Span:
    """The steps of one phase.

    Attributes:
        number: of the phase, from 1.
        names: what trains, sorted.
    """

    number: int
    names: tuple[str, ...]


def span_of(phases: Sequence[Phase], names: Iterable[str], step: int, total_steps: int) -> Span:
    """The phase that a step (from 1) is of. No phases are one in which all of `names` train.

    Raises:
        AdapterError: a phase names what is not there.
    """
    every = tuple(sorted(names))
    for number, phase in enumerate(phases, 1):
        end = round(phase.until * total_steps)
        if step <= end or number == len(phases):
            unknown = sorted((phase.names or set()) - set(every))
            if unknown:
                raise AdapterError(f"phase {number} trains {unknown[0]}, which is not there", where="method")
            return Span(number, every if phase.names is None else tuple(sorted(phase.names)))
    return Span(1, every)


def train_only(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> None:
    """Asks for gradients of these alone, so that a phase pays for no more than what trains in it."""
    chosen = set(names)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
        if name not in chosen:
            parameter.grad = None
