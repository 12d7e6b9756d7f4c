"""Numbers as codes of 4 or 8 bits with a scale for each block: nf4, dynamic 8-bit and linear int8, and back.

nf4: sixteen quantiles of a normal distribution, blocks of 64, whose scales are themselves 8-bit codes in blocks of 256
(Dettmers et al. 2023, arXiv 2305.14314, section 3). Dynamic 8-bit: the digits stand where the number is small or large
(Dettmers et al. 2021, arXiv 2110.02861, section 2.1). int8: 127 even steps on both sides of zero, a scale for each
row (Dettmers et al. 2022, arXiv 2208.07339, section 3.1). What a matrix of codes does in a model is in `quantized.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from tunesmith.kernels.build import DTYPES, Functions, pointer, threads, usable

BLOCK = 64  # numbers of nf4 that share a scale
SCALES = 256  # scales that share a scale
_LEVELS = 7  # powers of ten of the dynamic format

kernels = Functions(ts_from_four_bits="pppplii", ts_from_eight_bits="pppllii")


# appendix E: quantiles of N(0, 1), eight above zero and seven below, so that the largest is 1
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _dynamic(signed: bool) -> Tensor:
    positive = []
    for level in range(_LEVELS):
        edges = torch.linspace(0.1, 1, 2 ** (level if signed else level + 1) + 1, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (level - _LEVELS + 1))
    found = torch.cat(positive)
    both = torch.cat([found, -found]) if signed else found
    return torch.cat([both, torch.tensor([0.0, 1.0], device="cpu")]).sort().values


# made once, on import: what is made while a plan is would be without data. All float32, ascending.
NF4 = torch.tensor(_NF4, device="cpu")
# the 256 numbers of the dynamic format by whether there are negative ones; without, twice as many digits
DYNAMIC = {signed: _dynamic(signed) for signed in (True, False)}


def to_nf4(x: Tensor) -> dict[str, Tensor]:
    """Codes of a tensor, in its order; blocks run over its rows.

    Returns:
        codes: uint8, two to a byte, the first in the high half; scales: uint8, codes of the blocks' largest magnitudes
        less `offset`; steps: float32, what these are multiplied by, one for 256; offset: float32, their mean.
    """
    blocks = _in_blocks(x, BLOCK)
    largest = blocks.abs().amax(1)
    codes = _nearest(blocks * _inverse(largest)[:, None], NF4).view(-1, 2)
    offset = largest.mean()
    scales, steps = to_dynamic(largest - offset, signed=True, block=SCALES)
    return {"codes": codes[:, 0] << 4 | codes[:, 1], "scales": scales, "steps": steps, "offset": offset}


def from_nf4(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The numbers of codes: table x scale in float32, rounded once to `dtype`."""
    scales = from_dynamic(parts["scales"], parts["steps"], signed=True, block=SCALES) + parts["offset"]
    codes, table = parts["codes"], NF4.to(scales.device)
    if not (dtype in DTYPES and usable(scales)):
        return plain_nf4(codes, scales, shape, dtype)
    found = torch.empty(shape, dtype=dtype, device=codes.device)
    where = (pointer(codes), pointer(table), pointer(scales), pointer(found))
    kernels.ts_from_four_bits(*where, found.numel(), DTYPES[dtype], threads())
    return found


def plain_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The plain twin of the kernel: scales are float32."""
    table = NF4.to(scales.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # of every byte, both numbers
    numbers = pairs.index_select(0, codes.int()).view(-1, BLOCK) * scales[:, None]
    return numbers.view(-1)[: shape.numel()].view(shape).to(dtype)


def to_dynamic(
    x: Tensor,
    *,
    signed: bool,
    block: int,
    chance: Tensor | None = None,
    lead: int = 0,
    largest: Mapping[int, float] = MappingProxyType({}),
) -> tuple[Tensor, Tensor]:
    """Codes of a tensor of any shape, uint8 in one row, and the largest magnitude of every block, float32.

    Args:
        signed: whether it has negative numbers.
        chance: of the shape of x, in [0, 1): a number between two of the table becomes the larger one where its share
            of the way there is more than this; None takes the nearer one.
        lead: numbers that are elsewhere and come before in the first block.
        largest: magnitudes of blocks that have numbers elsewhere, too, by their place here.
    """
    blocks = _in_blocks(x, block, lead)
    scales = blocks.abs().amax(1)
    for number, magnitude in largest.items():
        scales[number] = magnitude
    scaled = blocks * _inverse(scales)[:, None]
    if chance is None:
        codes = _nearest(scaled, DYNAMIC[signed])
    else:
        table = DYNAMIC[signed].to(x.device)
        place = torch.bucketize(scaled.view(-1), table[1:-1], right=True, out_int32=True)
        lower, step = table.index_select(0, place), table.diff().index_select(0, place)
        codes = place + (scaled.view(-1) - lower > step * _in_blocks(chance, block, lead).view(-1))
        codes = codes.to(torch.uint8)
    return codes.view(-1)[lead : lead + x.numel()], scales


def from_dynamic(codes: Tensor, scales: Tensor, *, signed: bool, block: int, lead: int = 0) -> Tensor:
    """The numbers of `to_dynamic`, float32 in one row; codes may be some, with `lead` numbers before them."""
    table = DYNAMIC[signed].to(codes.device)
    begin, end = lead // block, -(-(lead + codes.numel()) // block)
    wide = scales[begin:end].repeat_interleave(block)[lead - begin * block :]
    return table.index_select(0, codes.int()) * wide[: codes.numel()]


def to_int8(x: Tensor) -> dict[str, Tensor]:
    """codes: int8 [rows, width]; scales: float32 [rows], a 127th of the largest magnitude of each row."""
    wide = x.float()
    scales = wide.abs().amax(1) / 127
    return {"codes": (wide * _inverse(scales)[:, None]).round().to(torch.int8), "scales": scales}


def from_int8(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The numbers of codes: code x scale in float32, rounded once to `dtype`."""
    codes, scales = parts["codes"], parts["scales"]
    if not (dtype in DTYPES and usable(scales)):
        return plain_int8(codes, scales, dtype)
    found = torch.empty(shape, dtype=dtype, device=codes.device)
    where = (pointer(codes), pointer(scales), pointer(found))
    kernels.ts_from_eight_bits(*where, *codes.shape, DTYPES[dtype], threads())
    return found


def plain_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The plain twin of the kernel."""
    return (codes.float() * scales[:, None]).to(dtype)


def _in_blocks(x: Tensor, block: int, lead: int = 0) -> Tensor:
    """[blocks, block], float32; zeros before the numbers and behind them."""
    flat = x.reshape(-1).float()
    filled = torch.nn.functional.pad(flat, (lead, -(lead + flat.numel()) % block))
    return filled.view(filled.numel() // block, block)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for a block of zeros."""
    return torch.where(x == 0, 0, 1 / x)


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """The place of the nearest number of a table, uint8; half-way goes to the smaller."""
    return torch.bucketize(x, ((table[:-1] + table[1:]) / 2).to(x.device), out_int32=True).to(torch.uint8)
