"""Folding adapters into the weights and taking them out again, exactly.

The one idea: a merged weight is a new parameter and the old one is kept aside, so that unmerging gives back the same
bytes and a tied partner never notices. Nothing is ever subtracted. Disabling an adapter needs no merge: it is the
route `BASE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.biases import add_biases
from tunesmith.models.copies import settle
from tunesmith.models.inserts import Insert, gathered, spread
from tunesmith.models.ports import Port, attached_to, port_kind, ports

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded


@torch.no_grad()
def merge(loaded: Loaded, names: str | Sequence[str]) -> None:
    """Adds what adapters learnt to the weights: W + the sum of their changes, in float32, rounded once.

    Biases likewise; a map that had none gets one where a switch of the config says so to transformers.
    Where an adapter has a copy of a parameter, the copy stands. Where a weight is shared (embedding and head), only the
    side that an adapter is on changes: the pair is untied, and the config says so. Until `unmerge`, the model can run
    on no other route.

    Raises:
        AdapterError: something is merged already, an adapter is not attached, its method is no change of weights and
            biases, or it adds a bias where the family has no place for one.
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
        take_biases = _with_biases(loaded.model, fresh, names)
    except AdapterError:
        undo()
        raise
    tied = _shared(loaded.model)
    config, was_tied = loaded.model.config, getattr(loaded.model.config, "tie_word_embeddings", None)
    old = {port: {name: port._parameters[name] for name in values} for port, values in fresh.items()}

    def restore() -> None:
        for port, values in old.items():
            port._parameters.update(values)
            port.__dict__.pop("forward", None)
        take_biases()
        if was_tied is not None:
            config.tie_word_embeddings = was_tied
        undo()

    if was_tied and any(id(held) in tied for values in old.values() for held in values.values()):
        config.tie_word_embeddings = False
    for port, changed in fresh.items():
        port._parameters.update({name: nn.Parameter(value, requires_grad=False) for name, value in changed.items()})
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
    found = ((port, _inserts(port, names)) for port in ports(model))
    return [(port, inserts) for port, inserts in found if inserts]


def _inserts(port: Port, names: Sequence[str]) -> list[Insert]:
    return [insert for name in names for insert in port.of(name)]


def _merged(port: Port, inserts: Sequence[Insert]) -> dict[str, Tensor]:
    """Weight and bias of a port with the changes of inserts in them, by name: those that change, in their own dtype."""
    own = {name: held for name in ("weight", "bias") if (held := port._parameters.get(name)) is not None}
    total = {name: held.detach().to(torch.float32, copy=True) for name, held in own.items()}
    changed: dict[str, Tensor] = {}
    for insert in inserts:
        bias, flipped = total.get("bias"), total["weight"]
        if port_kind(port) == "linear":
            flipped = flipped.T  # inputs x outputs, as the others have it
        rows = insert.rows
        role = flipped if rows is None else gathered(flipped, rows)
        role_bias = bias if bias is None or rows is None else gathered(bias, rows)
        change, shift = insert.method.fold(insert, role.T if role.dim() > 1 else role, role_bias)
        if change is None and shift is None:
            raise AdapterError(f"{insert.method.kind} is no change of weights and cannot be merged")
        if change is not None:
            flipped += change.T if rows is None else spread(change.T, rows)  # into what it is a view of
            changed["weight"] = total["weight"]
        if shift is not None:
            shift = shift if rows is None else spread(shift, rows)
            changed["bias"] = total["bias"] = shift.to(torch.float32) if bias is None else bias + shift
    return {name: value.to(own.get(name, own["weight"]).dtype) for name, value in changed.items()}


def _with_biases(model: nn.Module, fresh: dict[Port, dict[str, Tensor]], names: Sequence[str]) -> Callable[[], None]:
    """Room for biases that maps get and have not; answers what takes it away. Raises AdapterError."""
    new = [port for port, values in fresh.items() if "bias" in values and port._parameters.get("bias") is None]
    try:
        return add_biases(model, [port.path for port in new])
    except AdapterError as error:
        kinds = {one.method.kind for port in new for one in _inserts(port, names) if one.method.weight(one) is None}
        raise AdapterError(f"{' '.join(sorted(kinds))} cannot be merged: {error.message}") from error


def _shared(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds, by id."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
