"""Where the rows of a share lie in what a port is given: documents end to end, rows of a batch, or picked entries.

The one idea: a row is found from what was entered (route.py), never from the values; an input whose shape does not
tell rows apart is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import AdapterError
from tunesmith.models.route import Share, current_owners, current_segments


def places(share: Share, x: Tensor) -> tuple[int, Tensor] | None:
    """The dimension of x along which rows lie, and int64 indices into it; None for all of x.

    Raises:
        AdapterError: x does not hold the rows of the route.
    """
    if share.rows is None:
        return None
    owners, segments = current_owners(), current_segments()
    if owners is not None:
        held = [place for place, row in enumerate(owners.rows) if row in share.rows]
        _check(len(owners.rows) == x.shape[0] and max(owners.rows, default=0) < share.count, share, x)
        return 0, torch.tensor(held, dtype=torch.int64, device=x.device)
    if segments is not None:
        total = sum(segments.lengths)
        # some models flatten what goes into their maps
        dim = 1 if x.dim() > 1 and x.shape[:2] == (1, total) else 0
        _check(len(segments.lengths) == share.count and x.shape[dim] == total, share, x)
        return dim, runs(share.rows, segments.lengths, x.device)
    if x.shape[0] != share.count:
        _check(x.dim() == 2 and x.shape[0] % share.count == 0, share, x)
        return 0, runs(share.rows, [x.shape[0] // share.count] * share.count, x.device)
    return 0, torch.tensor(share.rows, device=x.device)


def runs(rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Places of all tokens of some documents that lie end to end: int64 [tokens of these]."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    parts = [torch.arange(ends[row], ends[row + 1], device=device) for row in rows]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _check(fits: bool, share: Share, x: Tensor) -> None:
    if not fits:
        raise AdapterError(
            f"the route has {share.count} rows, and they cannot be told apart in an input of shape {list(x.shape)}",
            hint="a route for each row of the batch, or the same for all",
        )
