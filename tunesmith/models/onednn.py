"""How many compiled kernels oneDNN keeps on a CPU: enough for the shapes at hand, not for all that ever were.

Packed rows give nearly every micro-batch a length of its own. oneDNN and torch each keep up to 1,024 kernels, one a
shape, with scratch memory: a run of many lengths grows for hundreds of steps. Measurements are in docs/log.md.
"""

from __future__ import annotations

import os

# twice what one micro-batch of a llama needs, so that forward, backward and evaluation find theirs
KERNELS = "64"
_SIZES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_caches() -> None:
    """Sets both sizes unless the user has; without effect once a kernel has run in this process."""
    for name in _SIZES:
        os.environ.setdefault(name, KERNELS)
