"""Context variables as blocks: a value for as long as a `with` lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


@contextmanager
def holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Gives a context variable a value for the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
