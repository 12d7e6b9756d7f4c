"""What is faster on this machine at this moment, found by trying: how many threads, and which numbers.

Two threads are nearly twice as fast as one on a quiet machine and a tenth as fast beside a busy neighbour, because
each operation ends with all of them waiting for the slowest; no property of the machine says which it is today.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# settings by which people say themselves how many threads there should be
ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ROUNDS = 5
_CLEAR = 1.5  # times as fast in three rounds needs no more of them
_TOKENS, _WIDTH, _INNER = 256, 576, 1536  # a block of a small model, a few milliseconds of work


def choose_threads() -> float:
    """Sets torch to the number of threads that is fastest now and answers how much faster than one it is.

    A number that the environment asks for stays.
    """
    most = torch.get_num_threads()
    if most == 1 or any(name in os.environ for name in ASKED):
        return 1.0
    candidates = sorted({1, *(most >> shift for shift in range(most.bit_length()))})
    tensors = _tensors(torch.bfloat16 if _has_bf16() else torch.float32)
    times: dict[int, list[float]] = {count: [] for count in candidates}
    for turn in range(ROUNDS + 1):
        for count in candidates:
            torch.set_num_threads(count)
            took = _seconds(tensors)
            if turn:  # the first turn starts the threads
                times[count].append(took)
    typical = {count: statistics.median(held) for count, held in times.items()}
    best = min(candidates, key=lambda count: typical[count] * (1 if count == 1 else 1.05))
    torch.set_num_threads(best)
    return typical[1] / typical[best]


@cache
def is_bf16_faster() -> bool:
    """Whether a CPU multiplies faster in bfloat16 than in float32: it has instructions for it, and they help."""
    if not _has_bf16():
        return False
    wide, narrow = _tensors(torch.float32), _tensors(torch.bfloat16)
    fp32 = bf16 = math.inf
    for turn in range(2 * ROUNDS):
        # the shortest of each: it owes least to what else the machine does, which must not decide this
        fp32, bf16 = min(fp32, _seconds(wide)), min(bf16, _seconds(narrow))
        if turn >= 2 and max(fp32, bf16) > _CLEAR * min(fp32, bf16):
            break
    return bf16 < fp32


def _has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _tensors(dtype: torch.dtype) -> Sequence[Tensor]:
    shapes = (_TOKENS, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER)
    return [torch.full(shape, 0.01, dtype=dtype) for shape in shapes]


def _seconds(tensors: Sequence[Tensor]) -> float:
    x, up, down = tensors
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(4):
            torch.nn.functional.linear(torch.nn.functional.linear(x, up), down).add_(x)
    return time.perf_counter() - began
