"""Randomness as a pure function of (seed, stream, indices): nothing depends on what was drawn before.

Streams have names (`init`, `data`, `dropout`, `sampling`, `evaluation`), so that drawing from one never
moves another.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, stream: str, *indices: int | str) -> int:
    """A 63-bit seed for one place of one stream."""
    text = "/".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, stream: str, *indices: int | str) -> torch.Generator:
    """A CPU generator for one place of one stream; draw on the CPU and move, so that devices agree."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, stream, *indices))


def permute(position: int, size: int, key: int) -> int:
    """Where `position` goes in a keyed shuffle of range(size), in constant memory.

    A four-round Feistel network over the next even number of bits, walked until it lands inside the range
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    if not 0 <= position < size:
        raise IndexError(f"position {position} is outside range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, key, turn) & mask)
        value = (left << half) | right
        if value < size:
            return value


def _mix(value: int, key: int, turn: int) -> int:
    # blake2b rather than hash(): the same on every machine and Python version
    raw = value.to_bytes(8, "big") + key.to_bytes(8, "big") + bytes([turn])
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
