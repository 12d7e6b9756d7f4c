"""What is measured during and after a run: the `evaluate` section of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from tunesmith.core.errors import did_you_mean
from tunesmith.core.section import Names, Section
from tunesmith.evaluate.metrics import E2E, METRICS


class EvaluateSection(Section):
    """Attributes:
    metrics: names from `tunesmith.evaluate.metrics.METRICS`; `e2e` stands for the five of the E2E challenge.
    every: steps between evaluations of the loss while training; 0 evaluates at the end only.
    generate: most new tokens of a completion.
    rows: first rows of the evaluation data that are used; all when absent.
    shots: examples of the training data put before each prompt.
    """

    metrics: Names = ()
    every: Annotated[int, Field(ge=0)] = 0
    generate: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    rows: Annotated[int, Field(ge=1)] | None = None
    shots: Annotated[int, Field(ge=0, le=1000)] = 0

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return metric_names(names)


def metric_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names with groups spelt out and repetitions dropped. Raises ValueError naming the nearest metric."""
    spelt = [name for given in names for name in (E2E if given == "e2e" else (given,))]
    for name in spelt:
        if name not in METRICS.table:
            known = [*METRICS.names(), "e2e"]
            hint = did_you_mean(name, known)
            raise ValueError(f"{name!r} is no metric; there are {' '.join(known)}" + (f"; {hint}" if hint else ""))
    return tuple(dict.fromkeys(spelt))
