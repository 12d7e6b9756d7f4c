"""Takes texts out of a row and says, where it cannot, what the key holds instead.

Errors carry no place: who knows the row adds it.
"""

from __future__ import annotations

from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.data.lines import describe


def text(data: dict[str, Any], key: str, *, optional: bool = False, filled: bool = False) -> str:
    """The text under a key.

    Args:
        optional: a missing key and null mean an empty text.
        filled: white space alone is an error: there would be nothing to learn.

    Raises: DataError.
    """
    value = data.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise DataError(f"the key {key!r} holds {describe(value)}; text is needed")
    if filled and not value.strip():
        raise DataError(f"the key {key!r} holds an empty text; there is nothing to learn from it")
    return value


def texts(data: dict[str, Any], key: str) -> tuple[str, ...]:
    """The texts of a list under an optional key. Raises DataError."""
    value = data.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise DataError(f"the key {key!r} holds {describe(value)}; a list of texts that are not empty is needed")
    return tuple(value)
