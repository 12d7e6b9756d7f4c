"""The formats of numbers beside each other: bits, range, spacing, pi, bytes, and what each is safe for.

Everything but the advice is asked of torch or of our own codes, so that the table cannot be wrong about what runs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

LARGEST = 4.0  # of the block in which pi is written as a code

_ADVICE = {
    "fp32": "everything; master weights, moments, losses and sums belong here",
    "tf32": "the inside of products on GPUs; operands and sums stay fp32",
    "bf16": "forward and backward of everything, frozen weights; not updates below {half_step:.2g} of a weight",
    "fp16": "forward and backward with loss scaling: gradients below {smallest:.1g} vanish, {largest:,.0f} is the most",
    "fp8 e4m3": "operands of forward products, each tensor with a scale of its own; nothing is summed in it",
    "fp8 e5m2": "gradients as operands of products, scaled; too coarse for weights",
    "int8": "frozen weights with a scale for each row; optimizer moments in blocks",
    "nf4": "frozen weights in blocks of 64, adapters on top; never what is trained",
}


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as the field has it.
        bits: of a number; of tf32 those that count, in memory it is fp32.
        largest, smallest: magnitudes, the smallest above zero. Of codes: as shares of the largest in the block.
        epsilon: step above 1, as a share of it; of codes the widest step, as a share of the largest in the block.
        pi: pi in it; of codes, in a block whose largest number is 4.
        bytes_per_parameter: of weights held in it, scales included.
        safe_for: what to do in it.
    """

    name: str
    bits: int
    largest: float
    smallest: float
    epsilon: float
    pi: float
    bytes_per_parameter: float
    safe_for: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def formats() -> list[Format]:
    """All formats, widest first."""
    import torch

    floats = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp8 e4m3": torch.float8_e4m3fn,
        "fp8 e5m2": torch.float8_e5m2,
    }
    found = {name: _of_float(name, dtype) for name, dtype in floats.items()} | {"tf32": _tf32()}
    found |= {name: _of_codes(name) for name in ("int8", "nf4")}
    return [found[name] for name in _ADVICE]


def show_formats(table: list[Format]) -> RenderableType:
    """The table for the terminal."""
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("format", "bits", "largest", "smallest", "epsilon", "pi", "bytes"):
        shown.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    shown.add_column("safe for")
    for one in table:
        numbers = (f"{one.largest:.5g}", f"{one.smallest:.2g}", f"{one.epsilon:.2g}", f"{one.pi:.7g}")
        shown.add_row(one.name, str(one.bits), *numbers, f"{one.bytes_per_parameter:.4g}", one.safe_for)
    shown.caption = (
        f"int8 and nf4: shares of the largest number of a row or block; pi where that is {LARGEST:g}. "
        "Bytes of a parameter in memory, scales with it; masters and moments come on top."
    )
    shown.caption_justify = "left"
    return shown


def _of_float(name: str, dtype: torch.dtype) -> Format:
    import torch

    found = torch.finfo(dtype)
    pi = torch.tensor(math.pi, dtype=torch.float64).to(dtype).double().item()
    # below the smallest normal number, steps stay as they are there
    smallest = found.smallest_normal * found.eps
    advice = _ADVICE[name].format(half_step=found.eps / 2, smallest=smallest, largest=found.max)
    return Format(name, found.bits, found.max, smallest, found.eps, pi, dtype.itemsize, advice)


def _tf32() -> Format:
    """fp32 whose fraction has as many bits as fp16's: torch computes with it, but has no tensors of it."""
    import torch

    wide, fraction = torch.finfo(torch.float32), torch.finfo(torch.float16)
    dropped = round(math.log2(fraction.eps / wide.eps))
    bits = torch.tensor(math.pi).view(torch.int32)
    pi = (bits + (1 << (dropped - 1)) & -(1 << dropped)).view(torch.float32).item()
    largest = wide.max * (2 - fraction.eps) / (2 - wide.eps)
    smallest = wide.smallest_normal * fraction.eps
    return Format("tf32", wide.bits - dropped, largest, smallest, fraction.eps, pi, 4, _ADVICE["tf32"])


def _of_codes(name: str) -> Format:
    import torch

    from tunesmith.kernels.quantized import quantize

    numbers = torch.linspace(-LARGEST, LARGEST, 1 << 16).view(1, -1)
    if name == "nf4":
        from tunesmith.kernels.codes import NF4

        table = NF4.double()
    else:
        table = quantize(numbers, "int8", torch.float32).dense().double().unique() / LARGEST
    block = torch.full((64, 64), math.pi)
    block[:, 0] = LARGEST
    held = quantize(block, name, torch.float32)  # type: ignore[arg-type]
    large = quantize(torch.empty(4096, 4096, device="meta"), name, torch.float32)  # type: ignore[arg-type]
    return Format(
        name,
        8 if name == "int8" else 4,
        table.max().item(),
        table[table > 0].min().item(),
        table.diff().max().item(),
        held.dense()[0, 1].item(),
        large.held_bytes / large.numel(),
        _ADVICE[name],
    )
