"""Products with weights that stay as they are: laid out once as oneDNN reads them, where torch has it, and plain twin.

torch's own product of few rows with a weight in bfloat16 spends more time on laying the weight out than on anything
else. What is laid out is a copy, so it is made only where the same weights will be read many times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.switches import on
from tunesmith.kernels.build import usable


class Packed:
    """Weights [outputs, inputs] side by side, and their biases [outputs], of which there is one for each or none."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), rows: int = 32) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        joined = torch.cat(self.weights) if len(self.weights) > 1 else self.weights[0]
        self.held = torch.ops.mkldnn._reorder_linear_weight(joined, rows) if _can(joined) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x w' + bias for x [rows, inputs]: [rows, sum of outputs]. No gradient flows through it."""
        if self.held is None:
            return plain(x, self.weights, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.held, self.bias, "none", [], "")
        return y


def plain(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The plain twin."""
    y = torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], 1)
    return y if bias is None else y + bias


def _can(weight: Tensor) -> bool:
    known = weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return on("products") and torch.backends.mkldnn.is_available() and usable(weight) and known
