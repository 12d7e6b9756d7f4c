"""Folding adapters into the weights and taking them out again, exactly.

The one idea: a merged weight is a new parameter and the old one is kept aside, so that unmerging gives back the same
bytes and a tied partner never notices. Nothing is ever subtracted. Disabling an adapter needs no merge: it is the
route `BASE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.copies import settle
from tunesmith.models.ports import Insert, Port, attached_to, port_kind, ports, spread

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded


@torch.no_grad()
def merge(loaded: Loaded, names: str | Sequence[str]) -> None:
    """Adds what adapters learnt to the weights: W + the sum of their changes, in float32, rounded once.

    Where an adapter has a copy of a parameter, the copy stands. Where a weight is shared (embedding and head), only the
    side that an adapter is on changes: the pair is untied, and the config says so. Until `unmerge`, the model can run
    on no other route.

    Raises:
        AdapterError: something is merged already, an adapter is not attached, or its method is no change of weights.
    """
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    attached = attached_to(loaded.model)
    if attached.merged:
        raise AdapterError(f"{', '.join(attached.merged)} is merged already", hint="unmerge first")
    for name in names:
        if name not in attached.names:
            raise AdapterError(f"no adapter {name!r} is attached; there are: {', '.join(attached.names) or 'none'}")
    if not names:
        return
    undo = settle(loaded.model, names)
    try:
        fresh = {port: _merged(port, inserts) for port, inserts in _acting(loaded.model, names)}
    except AdapterError:
        undo()
        raise
    tied = _shared(loaded.model)
    config, was_tied = loaded.model.config, getattr(loaded.model.config, "tie_word_embeddings", None)
    old = {port: port._parameters["weight"] for port in fresh}

    def restore() -> None:
        for port, weight in old.items():
            port._parameters["weight"] = weight
            port.__dict__.pop("forward", None)
        if was_tied is not None:
            config.tie_word_embeddings = was_tied
        undo()

    if was_tied and any(id(weight) in tied for weight in old.values()):
        config.tie_word_embeddings = False
    for port, weight in fresh.items():
        port._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    for port in list(fresh)[1:]:
        # the first one still asks whether the route is the merged one, for all: the others cost what the base costs
        port.__dict__["forward"] = port.base.forward
    attached.merged, attached.restore = names, restore


def unmerge(loaded: Loaded) -> None:
    """Puts back the very weights that `merge` replaced. Raises AdapterError when nothing is merged."""
    attached = attached_to(loaded.model)
    if attached.restore is None:
        raise AdapterError("nothing is merged")
    attached.restore()
    attached.merged, attached.restore = (), None


def _acting(model: nn.Module, names: Sequence[str]) -> list[tuple[Port, list[Insert]]]:
    found = []
    for port in ports(model):
        held = [port.inserts[name] for name in names if name in port.inserts]
        inserts = [insert for group in held for insert in group.values()]  # type: ignore[operator,union-attr]
        if inserts:
            found.append((port, inserts))
    return found


def _merged(port: Port, inserts: Sequence[Insert]) -> Tensor:
    """The weight of a port with the changes of inserts in it, in its own dtype and layout."""
    weight = port._parameters["weight"]
    assert weight is not None
    total = weight.detach().to(torch.float32, copy=True)
    for insert in inserts:
        change = insert.method.weight(insert)
        if change is None:
            raise AdapterError(f"{insert.method.kind} is no change of weights and cannot be merged")
        flipped = change.T  # inputs x outputs
        if insert.rows is not None:
            flipped = spread(flipped, insert.rows)
        total += flipped.T if port_kind(port) == "linear" else flipped
    return total.to(weight.dtype)


def _shared(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds, by id."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
