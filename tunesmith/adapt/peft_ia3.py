"""IA3 in the names, shapes and settings of the peft library, both ways.

The one idea: peft knows one vector a module, [outputs, 1] or, where the module is scaled as it reads, [1, inputs]; the
shape says which. Roles that share a fused map (k and v of gpt2) are one vector there, with ones for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.adapt.ia3 import IA3
from tunesmith.core.errors import AdapterError
from tunesmith.models.inserts import Insert, gathered, spread
from tunesmith.models.patterns import matching
from tunesmith.models.ports import Port, port_kind
from tunesmith.models.targets import Target, placed

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

PREFIX, NAME = "base_model.model.", ".ia3_l"
_TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of an adapter as peft wants them."""
    groups = _by_port(adapter)
    settings = {
        "peft_type": "IA3",
        "task_type": _TASKS.get(adapter.loaded.family.kind),
        "target_modules": [port.path for port in groups],
        "feedforward_modules": [port.path for port, inserts in groups.items() if "inputs" in inserts[0]._parameters],
        "fan_in_fan_out": any(port_kind(port) == "conv1d" for port in groups),
        "init_ia3_weights": True,
    }
    return settings, {f"{PREFIX}{port.path}{NAME}": _joined(inserts) for port, inserts in groups.items()}


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """An adapter from peft's settings and tensors; `own` is the method where tunesmith wrote them.

    Raises:
        AdapterError: a setting is not supported, or tensors do not fit.
    """
    from tunesmith.adapt.store import fits

    if settings.get("modules_to_save"):
        raise AdapterError("it uses what is not supported here: modules_to_save", where=where)
    adapter = own.attach(loaded, name) if isinstance(own, IA3) else _attach(loaded, settings, tensors, name, where)
    groups = {f"{PREFIX}{port.path}{NAME}": inserts for port, inserts in _by_port(adapter).items()}
    try:
        fits({key: tuple(_joined(inserts).shape) for key, inserts in groups.items()}, tensors, where)
        for key, inserts in groups.items():
            _fill(inserts, tensors[key].float(), f"{where}: {key}")
    except AdapterError:
        adapter.detach()
        raise
    return adapter


def _attach(
    loaded: Loaded, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, where: str
) -> Adapter:
    from tunesmith.adapt.adapter import Adapter

    maps = {path: m for path, m in loaded.model.named_modules() if port_kind(m) in ("linear", "conv1d")}
    held = [path for path in maps if f"{PREFIX}{path}{NAME}" in tensors]
    lacking = [path for path in _chosen(settings, maps, where) if path not in held]
    if lacking:
        raise AdapterError(f"missing {', '.join(f'{PREFIX}{path}{NAME}' for path in lacking[:5])}", where=where)
    table = placed(loaded.family, maps, loaded.model)
    method = IA3(targets=tuple(held) or ("none",))
    adapter = Adapter(name, method, loaded)
    for path in held:
        known = table.get(path, [])
        target = known[0] if len(known) == 1 else Target(path, path.rpartition(".")[2])
        reads = tensors[f"{PREFIX}{path}{NAME}"].shape[0] == 1
        adapter.add(target, method.factors(loaded.model, target, "inputs" if reads else "outputs"))
    return adapter.close()


def _chosen(settings: Mapping[str, Any], maps: Mapping[str, nn.Module], where: str) -> Iterable[str]:
    """The modules that `target_modules` means; empty where other settings narrow it down and the tensors decide."""
    wanted = settings.get("target_modules")
    if not wanted or settings.get("exclude_modules") or wanted == "all-linear":
        return []
    if isinstance(wanted, str):
        return matching(wanted, list(maps), f"{where}: target_modules")
    return [path for path in maps if any(path == end or path.endswith(f".{end}") for end in wanted)]


def _by_port(adapter: Adapter) -> dict[Port, list[Insert]]:
    groups: dict[Port, list[Insert]] = {}
    for port, _, insert in adapter.inserts():
        groups.setdefault(port, []).append(insert)
    return groups


def _joined(inserts: list[Insert]) -> Tensor:
    """The one vector of a port: [outputs, 1] or [1, inputs]."""
    if "inputs" in inserts[0]._parameters:
        return inserts[0]["inputs"].detach()[None]
    whole = torch.ones(1)
    for insert in inserts:
        own = insert["outputs"].detach()
        if insert.rows is None:
            return own[:, None]
        # chosen, not added up: what is written is, bit for bit, what was trained
        whole = torch.where(_rows(insert), spread(own, insert.rows), whole.to(own))
    return whole[:, None]


@torch.no_grad()
def _fill(inserts: list[Insert], vector: Tensor, where: str) -> None:
    vector = vector.flatten()
    others = torch.ones_like(vector, dtype=torch.bool)
    for insert in inserts:
        [factors] = insert.parameters()
        if insert.rows is None:
            factors.copy_(vector)
            return
        factors.copy_(gathered(vector, insert.rows))
        others &= ~_rows(insert).cpu()
    if (vector[others] != 1).any():
        raise AdapterError("it scales rows of another role", where=where)


def _rows(insert: Insert) -> Tensor:
    """Which output features of a fused map an insert scales."""
    assert insert.rows is not None
    return spread(torch.ones_like(insert["outputs"].detach()), insert.rows) > 0
