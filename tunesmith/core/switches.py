"""Savings that can be switched off one by one, to measure what each is worth or to find out which one is at fault.

None changes a result; they only change time and memory. `TUNESMITH_OFF=attention,trim` in the environment switches
some off for a whole program, `with without("attention"):` for a part of one. The environment is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from tunesmith.core.errors import ConfigError, did_you_mean

SAVINGS = {
    "attention": "attention inside documents by our own kernel",
    "elementwise": "norms, rotary positions, gated activations and cross-entropy in one pass each",
    "products": "our own matrix products where the processor multiplies bfloat16 (AMX, AVX-512)",
    "lowrank": "the backward of low-rank adapters written by hand: x and x A are all that it keeps",
    "grouped": "q, k and v in one product, gate and up in one",
    "remake": "what is cheap to make again is not kept for the backward",
    "trim": "the last block's maps only where a token is supervised",
    "shared_prefix": "a beginning that documents share is computed once",
    "paged": "rows are written at any place together, by our own blocks over keys and values in pages",
}
VARIABLE = "TUNESMITH_OFF"

_off: ContextVar[frozenset[str]] = ContextVar("tunesmith_off", default=frozenset())


def on(name: str) -> bool:
    """Whether a saving is in use. Raises ConfigError where the environment names one that does not exist."""
    return name not in _off.get() and name not in from_environment()


def off() -> list[str]:
    """The savings that are not in use. Raises ConfigError as `on` does."""
    return [name for name in SAVINGS if not on(name)]


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Switches savings off within."""
    token = _off.set(_off.get() | _known(names))
    try:
        yield
    finally:
        _off.reset(token)


@cache
def from_environment() -> frozenset[str]:
    """What the environment switches off. Raises ConfigError as `on` does."""
    return _known([name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()])


def _known(names: Iterable[str]) -> frozenset[str]:
    found = frozenset(names)
    for name in sorted(found - set(SAVINGS)):
        raise ConfigError(
            f"{name!r} is no saving; there are {', '.join(SAVINGS)}",
            where=VARIABLE,
            hint=did_you_mean(name, tuple(SAVINGS)),
        )
    return found
