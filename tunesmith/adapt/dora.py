"""DoRA: the length of each output's weights trains apart from their direction (Liu et al. 2024, arXiv 2402.09353).

W' = m V / |V| with V = W + s B A, where |V| is the length of each row, one an output feature, and m starts as |W|. As
the paper proposes (section 4.3), |V| is a constant for the gradient. What is added to the output is written so that it
is zero to the last bit where m is |V|: (m / |V| - 1) W x + m / |V| s B A x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.models.copies import swap_of
from tunesmith.models.inserts import Insert, gathered
from tunesmith.models.maps import base_matrix
from tunesmith.models.ports import port_kind


def base_lengths(module: nn.Module) -> Tensor:
    """|W| by rows of a whole map, float32 [outputs]."""
    return torch.linalg.vector_norm(base_matrix(module).float(), dim=1)


def start(insert: Insert, module: nn.Module) -> None:
    """Gives an insert its magnitudes `m`, float32 [outputs], as they are in the base."""
    insert.register_parameter("m", nn.Parameter(_lengths(insert, base_matrix(module, insert.rows))))


def delta(insert: Insert, x: Tensor, dropped: Tensor, low: Tensor, y: Tensor) -> Tensor:
    """What is added to the output of the base.

    Args:
        x: the input; for an embedding, ids.
        dropped: the input of the factors. With dropout both parts of the formula are made from it, as in peft.
        low: s B A x [..., outputs].
        y: the output so far, all features of the map.
    """
    share = insert["m"] / _divisor(insert, base_matrix(insert.port, insert.rows))
    return (share - 1).to(y.dtype) * _base(insert, x, dropped, y) + share.to(y.dtype) * low


def weight(insert: Insert, change: Tensor) -> Tensor:
    """m V / |V| - W in float32, with V = W + `change`: [outputs, inputs]."""
    base = base_matrix(insert.port, insert.rows).float()
    share = insert["m"].detach() / _divisor(insert, base)
    return share[:, None] * (base + change) - base


@torch.no_grad()
def _lengths(insert: Insert, base: Tensor) -> Tensor:
    """|W + s B A| by rows, float32 [outputs]; the same bits as |W| while B or A is zero."""
    rows = torch.addmm(base.float(), insert["B"].float(), insert["A"].float(), alpha=insert.scale)
    return torch.linalg.vector_norm(rows, dim=1)


def _divisor(insert: Insert, base: Tensor) -> Tensor:
    lengths = _lengths(insert, base)
    # a row of zeros has no direction, and its m is 0
    return torch.where(lengths == 0, 1.0, lengths)


def _base(insert: Insert, x: Tensor, dropped: Tensor, y: Tensor) -> Tensor:
    """W x without the bias: [..., outputs of the role]."""
    port = insert.port
    if port_kind(port) == "embedding":  # before the factor that some families give their embeddings
        return nn.functional.embedding(x, base_matrix(port).T)
    if dropped is not x or len(port.inserts) > 1 or swap_of(port) is not None:
        return insert.mapped(dropped)  # y holds what others have added
    bias = port._parameters.get("bias")
    y = y if bias is None else y - bias
    return y if insert.rows is None else gathered(y, insert.rows)
