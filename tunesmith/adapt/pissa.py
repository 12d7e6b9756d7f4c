"""PiSSA: low-rank factors that start at the largest singular parts of W (Meng et al. 2024, arXiv 2404.02948).

With W = U S V^T, B starts as U sqrt(S / s) and A as sqrt(S / s) V^T, cut to the rank. The authors take s B A out of W;
here W stays as it is and the change is s (B A - B0 A0), the same function. It is computed from what has moved since the
start, (B - B0) A + B0 (A - A0): zero to the bit at step 0, and no small number is a difference of large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.adapt.lora import low_rank
from tunesmith.models.inserts import Insert
from tunesmith.models.maps import base_matrix


def start(insert: Insert, module: nn.Module, is_blank: bool) -> None:
    """Gives an insert its factors and, as buffers A0 and B0, where they started. A blank one is to be filled."""
    a, b = insert["A"], insert["B"]
    if not is_blank and a.device.type != "meta":
        with torch.no_grad():
            left, right = _split(base_matrix(module, insert.rows), a.shape[0], insert.scale)
            b.copy_(left)
            a.copy_(right)
    insert.register_buffer("A0", a.detach().clone())
    insert.register_buffer("B0", b.detach().clone())


def delta(insert: Insert, x: Tensor, dropped: Tensor, dtype: torch.dtype) -> Tensor:
    """s (B A x~ - B0 A0 x) in a dtype, x~ being the input after dropout: [..., outputs]. An embedding's x holds ids."""
    a, b, (a0, b0), scale = insert["A"], insert["B"], _began(insert), insert.scale
    moved = low_rank(a, b - b0, scale, dropped, dtype) + low_rank(a - a0, b0, scale, dropped, dtype)
    return moved if dropped is x else moved + low_rank(a0, b0, scale, dropped - x, dtype)


def weight(insert: Insert) -> Tensor:
    """s (B A - B0 A0) in float32: [outputs, inputs]."""
    a, b, (a0, b0) = insert["A"].detach(), insert["B"].detach(), _began(insert)
    return ((b - b0) @ a + b0 @ (a - a0)) * insert.scale


def factors(insert: Insert) -> tuple[Tensor, Tensor]:
    """The change as one pair of twice the rank: A [2 rank, inputs] over A0, B [outputs, 2 rank] beside -B0."""
    a0, b0 = _began(insert)
    return torch.cat([insert["A"].detach(), a0]), torch.cat([insert["B"].detach(), -b0], 1)


def fill(insert: Insert, a: Tensor, b: Tensor) -> None:
    """Takes over a pair that `factors` has made."""
    rank, (a0, b0) = insert["A"].shape[0], _began(insert)
    insert["A"].copy_(a[:rank])
    insert["B"].copy_(b[:, :rank])
    a0.copy_(a[rank:])
    b0.copy_(-b[:, rank:])


def _began(insert: Insert) -> tuple[Tensor, Tensor]:
    return insert.get_buffer("A0"), insert.get_buffer("B0")


def _split(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B0 [outputs, rank] and A0 [rank, inputs] with s B0 A0 the best approximation of W of that rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on any number of threads: a resumed run starts from them again
    try:
        left, sizes, right = torch.linalg.svd(weight.cpu().float(), full_matrices=False)
    finally:
        torch.set_num_threads(threads)
    left, right = left[:, :rank], right[:rank]
    # a singular pair may be turned round: the largest number of each left vector is positive
    sign = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    root = (sizes[:rank] / scale).sqrt()
    return left * sign * root, right * (sign * root).T
