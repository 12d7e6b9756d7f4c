"""In what an optimizer keeps its moments, how many bytes that is, and what is copied to be saved; the planner and the
trainer agree on it here."""

from __future__ import annotations

BLOCK = 256  # numbers of int8 that share a scale
SMALL = 4096  # tensors of fewer numbers stay fp32 in int8: they take nothing, and one outlier would be all of a block
COPIED_BYTES = 256_000_000  # of a state on the CPU that is copied, to be saved while training goes on
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def blocks_of(first: int, end: int) -> tuple[int, int]:
    """The blocks that the numbers from `first` to before `end` of a tensor lie in: the first, and behind the last."""
    begin = first // BLOCK
    return begin, -(-end // BLOCK) if end > first else begin


def kept_in(numbers: int, state: str) -> str:
    """The format of one moment of a tensor of so many numbers."""
    return "fp32" if state == "int8" and numbers < SMALL else state


def moment_bytes(numbers: int, state: str) -> int:
    """Bytes of one moment of a tensor, scales with it."""
    kept = kept_in(numbers, state)
    return numbers * STATE_BYTES[kept] + (4 * -(-numbers // BLOCK) if kept == "int8" else 0)
