"""The base's weight of a map, or of one of the roles in it, as one matrix whatever layout the family keeps it in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from tunesmith.models.copies import base_parameter
from tunesmith.models.inserts import gathered
from tunesmith.models.ports import port_kind

if TYPE_CHECKING:
    from tunesmith.models.targets import Rows


def base_matrix(module: nn.Module, rows: Rows | None = None) -> Tensor:
    """The weight of a linear map [outputs, inputs], or of an embedding [width, ids]; of some output features only."""
    weight = base_parameter(module)
    assert weight is not None
    held = weight.detach()
    held = held if port_kind(module) == "linear" else held.T
    return held if rows is None else gathered(held.T, rows).T
