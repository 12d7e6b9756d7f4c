"""Keys and values that stand before those of a document: found for attention from the route, row by row.

The one idea: they are no tokens. They take no room in what the model computes and none in its cache; attention puts
them in front each time, and the document's positions begin behind them (`soft.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.inserts import Keys
from tunesmith.models.ports import Port
from tunesmith.models.route import current_route
from tunesmith.models.soft import current_holes

Pair = tuple[Tensor, Tensor]


def preceding(module: nn.Module, key: Tensor, rows: int) -> list[Pair | None] | None:
    """What stands before the keys and values of each row in an attention module; None where nothing does.

    Args:
        key: [batch, kv heads, tokens, width], for the shape and dtype.
        rows: documents of the packed row, or rows of the batch.

    Returns:
        For each row keys and values [kv heads, length, width], or None.

    Raises:
        AdapterError: the route is for other rows, or nobody moved the positions.
    """
    ports = [child for child in module.children() if isinstance(child, Port)]
    if not ports or not ports[0].attached.keys:
        return None
    attached = ports[0].attached
    route = attached.settled(current_route())
    if not any(name in attached.keys for name in route.adapters):
        return None
    if current_holes() is None:
        raise AdapterError(
            f"{', '.join(name for name in route.adapters if name in attached.keys)}: positions begin behind a prefix",
            hint="run the model through Policy or generate, which see to it",
        )
    if route.rows and len(route.rows) != rows:
        raise AdapterError(f"the route is for {len(route.rows)} rows, attention has {rows}")
    made = {names: _joined(ports, names, key) for names in set(route.rows or [route.adapters])}
    return [made[route.of(row)] for row in range(rows)]


def side_by_side(pairs: Sequence[Pair | None], key: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same for a batch: keys and values [batch, kv heads, longest, width], and which are there.

    The last is boolean [batch, longest], or None where all are.
    """
    if all(pair is pairs[0] for pair in pairs) and pairs[0] is not None:
        keys, values = (states.expand(len(pairs), -1, -1, -1) for states in pairs[0])
        return keys, values, None
    lengths = [0 if pair is None else pair[0].shape[1] for pair in pairs]
    empty = key.new_zeros(key.shape[1], 0, key.shape[3])
    sides = []
    for side in (0, 1):
        rows = [empty if pair is None else pair[side] for pair in pairs]
        padded = [nn.functional.pad(row, (0, 0, 0, max(lengths) - row.shape[1])) for row in rows]
        sides.append(torch.stack(padded))
    there = torch.arange(max(lengths), device=key.device) < torch.tensor(lengths, device=key.device)[:, None]
    return sides[0], sides[1], there


def held_keys(port: Port, adapter: str) -> dict[str, Keys]:
    """What an adapter has before the keys (`k`) and the values (`v`) that are made here."""
    held = port.inserts[adapter].items() if adapter in port.inserts else ()  # type: ignore[operator,union-attr]
    return {role: insert for role, insert in held if isinstance(insert, Keys)}


def _joined(ports: Sequence[Port], names: Sequence[str], key: Tensor) -> Pair | None:
    sides: dict[str, list[Tensor]] = {"k": [], "v": []}
    for name in names:
        for port in ports:
            for role, insert in held_keys(port, name).items():
                states = insert.states().to(key.dtype)
                sides[role].append(states.unflatten(1, (key.shape[1], key.shape[3])).transpose(0, 1))
    if not sides["k"]:
        return None
    return torch.cat(sides["k"], 1), torch.cat(sides["v"], 1)
