"""Amounts as people read them: bytes, counts, times. Powers of ten, so that GB is 10^9 bytes.

Only for showing: everything inside counts bytes, tokens and seconds.
"""

from __future__ import annotations

import math


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
