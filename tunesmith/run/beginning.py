"""What a run says of its own beginning: how long its libraries took, in what it computes, when it was ready."""

from __future__ import annotations

import os
import time


def seconds_of_libraries() -> float:
    """Imports what every run needs and takes longest, and answers how long it took."""
    began = time.monotonic()
    import torch
    import transformers
    from transformers import modeling_utils, tokenization_utils_tokenizers

    del torch, transformers, modeling_utils, tokenization_utils_tokenizers
    return time.monotonic() - began


def how_computed(compute: str, gain: float) -> str:
    """In what numbers and on how many threads, and what these are worth now."""
    import torch

    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    line = f"computing in {compute} on {threads} thread{'s' if threads > 1 else ''}"
    if gain > 1:
        return f"{line}, {gain:.1f} times as fast as one now"
    if threads > 1 and load > threads / 2:
        line += f"; this machine is busy (load {load:.1f}): OMP_NUM_THREADS=1 may be faster"
    return line


def started_line(libraries: float, began: float | None = None) -> str:
    """How long it took until all is there to work with, its libraries apart.

    Args:
        began: when, in seconds of `time.time()`; by default when the program did.
    """
    import psutil

    took = time.time() - (psutil.Process().create_time() if began is None else began)
    return f"ready after {took - libraries:.1f} s, and {libraries:.1f} s more to import torch and transformers"
