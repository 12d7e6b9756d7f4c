"""Amounts as people read and write them: bytes, counts, times. Powers of ten, so that GB is 10^9 bytes.

Only for showing and asking: everything inside counts bytes, tokens and seconds.
"""

from __future__ import annotations

import math
import re

from tunesmith.core.errors import ConfigError

_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30}


def read_bytes(text: str, where: str) -> int:
    """Bytes of 24GB, "1.5 GiB", 800mb or a plain number. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _SIZES or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no amount of memory", where=where, hint="as in 24GB, 800MB or 1.5GiB")
    return int(float(found[1]) * _SIZES[found[2]])


def in_bytes(count: float) -> str:
    """48.0 GB, 731 MB, 12.3 kB."""
    return _scaled(count, ("bytes", "kB", "MB", "GB", "TB", "PB"))


def in_count(count: float) -> str:
    """134 M, 2.1 G, 17; what follows may be a unit, as in FLOP."""
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E", "Z", "Y")).strip()


def in_time(seconds: float) -> str:
    """48 s, 4 min 10 s, 3 h 12 min, 2 d 2 h; a part of a second counts as one."""
    whole = math.ceil(seconds) if seconds < 10 else round(seconds)
    for size, name, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    digits = 0 if step == 0 or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f} {units[step]}"
