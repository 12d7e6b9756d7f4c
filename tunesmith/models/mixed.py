"""Rows with low-rank changes of their own at one map, all at once: a product for each side, however many adapters.

Rows with the same adapters are laid side by side and padded to the longest of these groups, factors are stacked, so
that a batched product does for all what a loop would do for each. Differentiable in everything.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tunesmith.models.places import places
from tunesmith.models.route import Owners, Segments, Share, current_owners, current_segments

if TYPE_CHECKING:
    from tunesmith.kernels.lowrank import LowRank

Groups = tuple[tuple[int, ...], ...]


def together(port: Any, x: Tensor, y: Tensor | None = None) -> Tensor | None:
    """What a port makes of x [..., inputs]; None where rows do not differ, or changes are not all of low rank.

    Args:
        y: what its base makes of x, where that is known.

    Raises:
        AdapterError: x does not hold the rows of the route.
    """
    shares: tuple[Share, ...] = port.attached.shares()
    if not shares or shares[0].rows is None:
        return None
    found: dict[tuple[int, ...], list[LowRank]] = {}
    for share in shares:
        for insert in port.of(share.adapter):
            change = None if insert.rows is not None else insert.method.low_rank(insert)
            if change is None:
                return None
            found.setdefault(share.rows or (), []).append(change)
    y = port.base(x) if y is None else y
    if not found:
        return y
    groups = tuple(found)
    gather, back, flat = _laid_out(
        groups, shares[0].count, tuple(x.shape[:-1]), x.device, current_owners(), current_segments()
    )
    a, b = _stacked(list(found.values()), x.dtype)
    wide = x.flatten(0, -2).index_select(0, gather.flatten()).view(*gather.shape, -1)
    change = torch.bmm(torch.bmm(wide, a.transpose(1, 2)), b.transpose(1, 2)).flatten(0, 1).index_select(0, back)
    if flat is None:
        return y + change.view(y.shape)
    return y.flatten(0, -2).index_add(0, flat, change).view(y.shape)


@lru_cache(maxsize=16)
def _laid_out(
    groups: Groups,
    count: int,
    shape: tuple[int, ...],
    device: torch.device,
    owners: Owners | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens of each group, padded with any: [groups, longest]; and of tokens with a group, in order, where they are in
    that, flattened, and which they are: None for all.
    """
    numbers = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    parts = []
    for rows in groups:
        at = places(Share("", rows, count), numbers[..., None])
        parts.append(numbers.flatten() if at is None else numbers.index_select(*at).flatten())
    longest = max(map(len, parts))
    gather = torch.stack([pad(part, (0, longest - len(part))) for part in parts])
    starts = range(0, longest * len(parts), longest or 1)
    back = torch.cat(
        [torch.arange(len(part), device=device) + start for part, start in zip(parts, starts, strict=True)]
    )
    flat, order = torch.cat(parts).sort()
    return gather, back[order], flat if len(flat) < numbers.numel() else None


def _stacked(groups: list[list[LowRank]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [groups, rank, inputs] and s B [groups, outputs, rank], with zeros up to the largest rank."""
    a = [group[0].a if len(group) == 1 else torch.cat([one.a for one in group]) for group in groups]
    b = [group[0].b if len(group) == 1 else torch.cat([one.b * one.scale for one in group], 1) for group in groups]
    scales = [group[0].scale if len(group) == 1 else 1.0 for group in groups]
    most = max(map(len, a))
    a = [one if len(one) == most else pad(one, (0, 0, 0, most - len(one))) for one in a]
    b = [one if one.shape[1] == most else pad(one, (0, most - one.shape[1])) for one in b]
    wide = torch.stack(b)
    if len(set(scales)) == 1:
        return torch.stack(a).to(dtype), (wide if scales[0] == 1 else wide * scales[0]).to(dtype)
    return torch.stack(a).to(dtype), (wide * wide.new_tensor(scales)[:, None, None]).to(dtype)
