"""Weighted sums of LoRA adapters as one new LoRA adapter: adding what tasks have taught, and taking it away.

The one idea: a sum of low-rank changes is a low-rank change whose factors are those of the parts side by side, so that
nothing is approximated: w1 s1 B1 A1 + w2 s2 B2 A2 = [w1 s1 B1, w2 s2 B2] [A1; A2]. This is task arithmetic (Ilharco et
al. 2023, arXiv 2212.04089) on changes instead of whole models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.copies import swaps
from tunesmith.models.inserts import Insert
from tunesmith.models.ports import Port, attached_to, ports
from tunesmith.models.targets import Target, match

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded

_SCALE = 2.0  # what a LoRA of any rank has when alpha is not given; a power of two, so that dividing by it is exact

Place = tuple[str, str]  # path of a map, role


def combine(loaded: Loaded, weights: Mapping[str, float], name: str = "combined") -> Adapter:
    """Attaches the weighted sum of adapters that are attached: `combine(loaded, {"a": 0.5, "b": -1.0}, name="c")`.

    The parts stay as they are. Its rank at a map is the sum of theirs, and of those maps of a role that have less, the
    rest is zeros. It can be trained, saved and merged like any other.

    Args:
        weights: by the names of the adapters; a negative one takes away what an adapter has learnt.

    Raises:
        AdapterError: a part is not attached, or is no low-rank change; the name is taken.
        ConfigError: no part, or a weight that is no finite number.
    """
    if not weights:
        raise ConfigError("name at least one adapter and its weight", where="weights")
    for part, weight in weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"{weight} is no finite number", where=f"weights: {part}")
        _check(loaded.model, part)
    made = {
        (port.path, role): _sum(inserts, weights)
        for port in ports(loaded.model)
        for role, inserts in _by_role(port, weights).items()
    }
    method, fits = _method(loaded, made)
    adapter = Adapter(name, method, loaded)
    for (path, role), (a, b, insert) in made.items():
        own = method if fits else LoRA(rank=a.shape[0], targets=(path,))
        a, b = _padded(a, b, method.rank_at(role) if fits else a.shape[0])
        factors = {"A": nn.Parameter(a), "B": nn.Parameter(b)}
        adapter.add(Target(path, role, insert.rows), Insert(own, factors, insert.rows, _SCALE))
    return adapter.close()


def _check(model: nn.Module, name: str) -> None:
    there = attached_to(model).names
    if name not in there:
        raise AdapterError(f"no adapter {name!r} is attached; there are: {', '.join(there) or 'none'}")
    inserts = [insert for port in ports(model) for insert in port.of(name)]
    for insert in inserts:
        method = insert.method
        if not isinstance(method, LoRA) or method.dora:
            kind = "dora" if isinstance(method, LoRA) else method.kind
            raise AdapterError(f"{name} is {kind}, whose change is no low-rank matrix", hint="sums are of plain LoRA")
    if not inserts or any(name in swap.copies for swap in swaps(model)) or name in attached_to(model).heads:
        what = "whole parameters or a head" if inserts else "no low-rank change"
        raise AdapterError(f"{name} trains {what}, of which there is no sum here", hint="sums are of plain LoRA")


def _by_role(port: Port, names: Mapping[str, float]) -> dict[str, list[tuple[str, Insert]]]:
    """The inserts of some adapters at a port, by role."""
    found: dict[str, list[tuple[str, Insert]]] = {}
    for name in names:
        for role, insert in port.inserts[name].items() if name in port.inserts else ():  # type: ignore[operator,union-attr]
            found.setdefault(role, []).append((name, insert))
    return found


@torch.no_grad()
def _sum(parts: list[tuple[str, Insert]], weights: Mapping[str, float]) -> tuple[Tensor, Tensor, Insert]:
    """A [ranks, inputs] and B [outputs, ranks] at the common scale, and an insert that stands at the same place."""
    down, up = [], []
    for name, insert in parts:
        assert isinstance(insert.method, LoRA)
        a, b = insert.method.factors(insert)
        down.append(a)
        # in float64 until the one rounding: three factors
        up.append((b.double() * (weights[name] * insert.scale / _SCALE)).float())
    return torch.cat(down), torch.cat(up, 1), parts[0][1]


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - a.shape[0]
    return nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))


def _method(loaded: Loaded, made: Mapping[Place, tuple[Tensor, Tensor, Insert]]) -> tuple[LoRA, bool]:
    """The section that describes a sum, and whether it does so completely: by roles, with a rank for each."""
    ranks: dict[str, int] = {}
    for (_, role), (a, _, _) in made.items():
        ranks[role] = max(ranks.get(role, 1), a.shape[0])
    rank = max(ranks.values())
    try:
        meant = {(target.path, target.role) for target in match(loaded.model, loaded.family, ranks)}
    except ConfigError:
        meant = set()
    if meant != set(made):
        return LoRA(rank=rank, targets=tuple(dict.fromkeys(path for path, _ in made))), False
    own = {role: held for role, held in ranks.items() if held != rank}
    return LoRA(rank=rank, targets=tuple(ranks), ranks=own), True
