"""LoRA in the names, shapes and settings of the peft library, both ways.

The one idea: peft knows one pair of factors per module. Roles that share a fused map (q, k, v of gpt2) become one pair
there: their A stacked, their B side by side with zeros in the rows of the others, rank and alpha set per module so
that the scale stays the same. Files are opened and written in `store.py`, names are `peft_names.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.adapt.dora import base_lengths
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.peft_names import (
    PREFIX,
    TASKS,
    by_pattern,
    chosen,
    kept_modules,
    maps_of,
    module_names,
    named,
    patterned,
    without_base,
)
from tunesmith.core.errors import AdapterError
from tunesmith.models.copies import swap_of
from tunesmith.models.inserts import Insert, gathered, spread
from tunesmith.models.ports import Port, port_kind
from tunesmith.models.targets import Target, placed

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

# what changes the function and is not written here; each is refused by its name
_REFUSED = (
    "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config", "megatron_config",
)  # fmt: skip
# initial values that leave the base as it is; the others move part of it into the adapter
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_EXACT = "tunesmith."  # tensors that peft's one scale a module cannot hold exactly; peft passes over them


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of an adapter as peft wants them. Raises AdapterError when it is no LoRA."""
    method = adapter.method
    if not isinstance(method, LoRA):
        raise AdapterError(f"{method.kind} has no place in peft's LoRA files")
    groups = _by_port(adapter)
    # cloned: a file has no tensors that are one
    tensors = {f"{PREFIX}{path}": value.clone() for path, value in _copied(adapter).items()}
    for port, inserts in groups.items():
        tensors |= _joined(port, inserts) | _exact(port, inserts)
    ranks = {port.path: _rank(inserts.values()) for port, inserts in groups.items()}
    alphas = {port.path: _alpha(inserts, method) for port, inserts in groups.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS.get(adapter.loaded.family.kind),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "target_modules": module_names(adapter.loaded.model, list(ranks)),
        "rank_pattern": patterned(ranks, rank),
        "alpha_pattern": patterned(alphas, alpha),
        "modules_to_save": _whole(adapter) or None,
        "bias": "none",
        "fan_in_fan_out": any(port_kind(port) == "conv1d" for port in groups),
        "init_lora_weights": True,
    }
    if any(insert.method != method for _, _, insert in adapter.inserts()):
        # ranks that differ by module come from peft: read it back as peft's
        settings["tunesmith_method"] = None
    return settings, tensors


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """An adapter from peft's settings and tensors; `own` is the method where tunesmith wrote them.

    Raises:
        AdapterError: a setting is not supported, or tensors do not fit.
    """
    _refuse(settings, where)
    if isinstance(own, LoRA):
        if own.dora != bool(settings.get("use_dora")):
            raise AdapterError("use_dora says otherwise than tunesmith_method", where=where)
        adapter = own.blank(loaded, name)
    else:
        adapter = _attach(loaded, settings, tensors, name, where)
    try:
        told, whole = set(settings.get("modules_to_save") or ()), _whole(adapter)
        if isinstance(own, LoRA) and told != set(whole):
            raise AdapterError("modules_to_save says otherwise than also_train of tunesmith_method", where=where)
        copied = tuple(f"{PREFIX}{path}." for path in whole)
        kept = {key: value for key, value in tensors.items() if key.startswith(copied)} if copied else {}
        others = {key: value for key, value in tensors.items() if key not in kept}
        _fill(adapter, kept | without_base(loaded.model, others, where), where)
    except AdapterError:
        adapter.detach()
        raise
    return adapter


def _attach(loaded: Loaded, settings: Mapping[str, Any], tensors: Iterable[str], name: str, where: str) -> Adapter:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.also_train import groups

    maps, whole = maps_of(loaded.model), kept_modules(settings, loaded.model)
    paths = chosen(settings, maps, loaded.model, where) or named(tensors, maps)
    table = placed(loaded.family, maps, loaded.model)
    try:
        method = _method(settings, settings["r"], settings["lora_alpha"], paths, whole)
        ranks = by_pattern(settings.get("rank_pattern"), paths, where)
        alphas = by_pattern(settings.get("alpha_pattern"), paths, where)
        parts = {
            path: _method(settings, ranks.get(path, method.rank), alphas.get(path, method.alpha), [path])
            for path in paths
        }
    except (KeyError, ValueError, TypeError) as error:
        text = str(error).splitlines()[0]
        raise AdapterError(f"r, lora_alpha or a pattern cannot be used: {text}", where=where) from error
    copies = groups(loaded, whole, method.tie, set(paths))
    inserts = []
    for path, part in parts.items():
        known = table.get(path, [])
        target = known[0] if len(known) == 1 else Target(path, path.rpartition(".")[2])
        inserts.append((target, part.insert(loaded.model, target, None)))
    adapter = Adapter(name, method, loaded)
    for target, insert in inserts:
        adapter.add(target, insert)
    for group in copies:
        adapter.train_copy(*group)
    return adapter.close()


def _method(
    settings: Mapping[str, Any], rank: int, alpha: float | None, targets: list[str], whole: Iterable[str] = ()
) -> LoRA:
    return LoRA(
        rank=rank,
        alpha=alpha,
        targets=tuple(targets),
        dropout=settings.get("lora_dropout", 0.0),
        rslora=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
        also_train=tuple(whole),
        tie=bool(whole and settings.get("ensure_weight_tying")),
    )


def _fill(adapter: Adapter, tensors: dict[str, Tensor], where: str) -> None:
    """Copies tensors into inserts and copies after checking that they are exactly those that belong there."""
    from tunesmith.adapt.store import fits

    groups, copied = _by_port(adapter), _copied(adapter)
    wanted = {f"{PREFIX}{path}": tuple(value.shape) for path, value in copied.items()}
    exact: dict[str, Tensor] = {}
    for port, inserts in groups.items():
        wanted |= {key: tuple(value.shape) for key, value in _joined(port, inserts).items()}
        exact |= _exact(port, inserts)
    brought = {key: value for key, value in tensors.items() if key.startswith(_EXACT)}
    fits(
        wanted | {key: tuple(value.shape) for key, value in exact.items() if brought},
        tensors,
        where,
    )
    with torch.no_grad():
        for path, value in copied.items():
            value.copy_(tensors[f"{PREFIX}{path}"])
        for port, inserts in groups.items():
            _fill_port(port, inserts, tensors, where)


def _fill_port(port: Port, inserts: dict[str, Insert], tensors: dict[str, Tensor], where: str) -> None:
    a, b = (tensors[key].float() for key in _names(port))
    ranks = [_rank([insert]) for insert in inserts.values()]
    first = next(iter(inserts.values()))
    for (role, insert), down, up in zip(inserts.items(), a.split(ranks), b.split(ranks, 1), strict=True):
        mine = _own_rows(up, insert, port.path, where) / (insert.scale / first.scale)
        _lora(insert).fill(insert, down, tensors.get(_exact_name(port, role), mine))
        if "m" in insert._parameters:
            lengths = tensors[_magnitude_name(port)].float()
            insert["m"].copy_(lengths if insert.rows is None else gathered(lengths, insert.rows))
    if "m" in first._parameters:
        told = tensors[_magnitude_name(port)].to(first["m"].device)
        if not torch.allclose(_magnitudes(port, inserts.values()), told, rtol=1e-4):
            raise AdapterError(f"{port.path}: lengths of rows of another role differ from the base's", where=where)


def _own_rows(up: Tensor, insert: Insert, path: str, where: str) -> Tensor:
    if insert.rows is None:
        return up
    mine = gathered(up.T, insert.rows)
    if not torch.equal(spread(mine, insert.rows), up.T):
        raise AdapterError(f"{path}: B has values in rows of another role", where=where)
    return mine.T


def _joined(port: Port, inserts: dict[str, Insert]) -> dict[str, Tensor]:
    """One pair of factors for all inserts of a port, in the scale of one: A [ranks, inputs], B [outputs, ranks]."""
    held = list(inserts.values())
    a, b = [], []
    for insert in held:
        down, up = _lora(insert).factors(insert)
        up = up * (insert.scale / held[0].scale)
        a.append(down)
        b.append(up if insert.rows is None else spread(up.T, insert.rows).T)
    found = dict(zip(_names(port), (torch.cat(a), torch.cat(b, 1)), strict=True))
    if "m" in held[0]._parameters:
        found[_magnitude_name(port)] = _magnitudes(port, held)
    return found


def _magnitudes(port: Port, inserts: Iterable[Insert]) -> Tensor:
    """DoRA's lengths for all output features of a port: where no role of ours is, those of the base."""
    found = base_lengths(port)
    for insert in inserts:
        mine = insert["m"].detach()
        if insert.rows is not None:
            mine = torch.where(spread(torch.ones_like(mine), insert.rows) > 0, spread(mine, insert.rows), found)
        found = mine
    return found


def _magnitude_name(port: Port) -> str:
    return f"{PREFIX}{port.path}.lora_magnitude_vector"


def _exact(port: Port, inserts: dict[str, Insert]) -> dict[str, Tensor]:
    """B as it is of every role of a map whose roles have several scales: bringing them to one has rounded it."""
    if len({insert.scale for insert in inserts.values()}) == 1:
        return {}
    return {_exact_name(port, role): _lora(insert).factors(insert)[1] for role, insert in inserts.items()}


def _exact_name(port: Port, role: str) -> str:
    return f"{_EXACT}{port.path}.{role}.B"


def _whole(adapter: Adapter) -> list[str]:
    """The modules whose parameters train whole."""
    return sorted({path.rpartition(".")[0] for path in adapter.replaced})


def _copied(adapter: Adapter) -> dict[str, Tensor]:
    """What trains whole, at every place where it stands."""
    model = adapter.loaded.model
    found = {}
    for path in adapter.replaced:
        swap = swap_of(model.get_submodule(path.rpartition(".")[0]))
        assert swap is not None
        found[path] = swap.copies[adapter.name][path.rpartition(".")[2]].detach()
    return found


def _by_port(adapter: Adapter) -> dict[Port, dict[str, Insert]]:
    groups: dict[Port, dict[str, Insert]] = {}
    for port, role, insert in adapter.inserts():
        groups.setdefault(port, {})[role] = insert
    return groups


def _names(port: Port) -> tuple[str, str]:
    if port_kind(port) == "embedding":
        return f"{PREFIX}{port.path}.lora_embedding_A", f"{PREFIX}{port.path}.lora_embedding_B"
    return f"{PREFIX}{port.path}.lora_A.weight", f"{PREFIX}{port.path}.lora_B.weight"


def _refuse(settings: Mapping[str, Any], where: str) -> None:
    found = [key for key in _REFUSED if settings.get(key)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias: {settings['bias']}")
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        found.append(f"init_lora_weights: {settings['init_lora_weights']}")
    if found:
        raise AdapterError(
            f"it uses what is not supported here: {', '.join(found)}",
            where=where,
            hint="merge it with peft, or convert it to plain LoRA there",
        )


def _lora(insert: Insert) -> LoRA:
    assert isinstance(insert.method, LoRA)
    return insert.method


def _rank(inserts: Iterable[Insert]) -> int:
    return sum(insert["A"].shape[0] * (2 if _lora(insert).init == "pissa" else 1) for insert in inserts)


def _alpha(inserts: dict[str, Insert], method: LoRA) -> float:
    """The alpha that gives a module of these ranks the scale of its first insert."""
    rank, scale = _rank(inserts.values()), next(iter(inserts.values())).scale
    value = float(f"{scale * (rank**0.5 if method.rslora else rank):.15g}")
    return int(value) if value.is_integer() else value
