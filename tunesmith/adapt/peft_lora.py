"""LoRA in the names, shapes and settings of the peft library, both ways.

The one idea: peft knows one pair of factors per module. Roles that share a fused map (q, k, v of gpt2) become one pair
there: their A stacked, their B side by side with zeros in the rows of the others, rank and alpha set per module so
that the scale stays the same. Files are opened and written in `store.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import AdapterError
from tunesmith.models.patterns import is_regex, matching
from tunesmith.models.ports import INSERTS, Insert, Port, gathered, port_kind, ports, spread
from tunesmith.models.targets import Target, placed

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

PREFIX = "base_model.model."
_TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
# what changes the function and is not written here; each is refused by its name
_REFUSED = (
    "use_dora", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config", "megatron_config",
)  # fmt: skip
# initial values that leave the base as it is; the others move part of it into the adapter
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of an adapter as peft wants them. Raises AdapterError when it is no LoRA."""
    method = adapter.method
    if not isinstance(method, LoRA):
        raise AdapterError(f"{method.kind} has no place in peft's LoRA files")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    groups = _by_port(adapter)
    for port, inserts in groups.items():
        names = _names(port.path, port_kind(port) == "embedding")
        a, b = _joined(inserts)
        tensors |= dict(zip(names, (a, b), strict=True))
        rank, scale = a.shape[0], inserts[0].scale
        alpha = _number(scale * (rank**0.5 if method.rslora else rank))
        if rank != method.rank:
            ranks[port.path] = rank
        if alpha != _default_alpha(method):
            alphas[port.path] = alpha
    settings = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(adapter.loaded.family.kind),
        "r": method.rank,
        "lora_alpha": _default_alpha(method),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "target_modules": _module_names(adapter.loaded.model, [port.path for port in groups]),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": any(port_kind(port) == "conv1d" for port in groups),
        "init_lora_weights": True,
    }
    if any(insert.method != method for inserts in groups.values() for insert in inserts):
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
    tensors = _without_base(loaded.model, tensors, where)
    if isinstance(own, LoRA):
        adapter = own.attach(loaded, name)
    else:
        adapter = _attach(loaded, settings, tensors, name, where)
    try:
        _fill(adapter, tensors, where)
    except AdapterError:
        adapter.detach()
        raise
    return adapter


def _attach(loaded: Loaded, settings: Mapping[str, Any], tensors: Iterable[str], name: str, where: str) -> Adapter:
    from tunesmith.adapt.adapter import Adapter

    maps = {path: m for path, m in loaded.model.named_modules() if port_kind(m) not in (None, "norm")}
    chosen = _chosen(settings, maps, loaded.model, where) or _named(tensors, maps)
    table = placed(loaded.family, maps, loaded.model)
    try:
        whole = _method(settings, settings["r"], settings["lora_alpha"], list(chosen))
        ranks = _by_pattern(settings.get("rank_pattern"), chosen, where)
        alphas = _by_pattern(settings.get("alpha_pattern"), chosen, where)
        parts = {
            path: _method(settings, ranks.get(path, whole.rank), alphas.get(path, whole.alpha), [path])
            for path in chosen
        }
    except (KeyError, ValueError, TypeError) as error:
        text = str(error).splitlines()[0]
        raise AdapterError(f"r, lora_alpha or a pattern cannot be used: {text}", where=where) from error
    inserts = []
    for path, method in parts.items():
        known = table.get(path, [])
        target = known[0] if len(known) == 1 else Target(path, path.rpartition(".")[2])
        inserts.append((target, method.insert(loaded.model, target)))
    adapter = Adapter(name, whole, loaded)
    for target, insert in inserts:
        adapter.add(target, insert)
    return adapter.close()


def _method(settings: Mapping[str, Any], rank: int, alpha: float | None, targets: list[str]) -> LoRA:
    dropout, rslora = settings.get("lora_dropout", 0.0), bool(settings.get("use_rslora"))
    return LoRA(rank=rank, alpha=alpha, targets=tuple(targets), dropout=dropout, rslora=rslora)


def _fill(adapter: Adapter, tensors: dict[str, Tensor], where: str) -> None:
    """Copies tensors into inserts after checking that they are exactly those that belong there."""
    from tunesmith.adapt.store import fits

    groups = _by_port(adapter)
    wanted: dict[str, tuple[int, ...]] = {}
    for port, inserts in groups.items():
        names = _names(port.path, port_kind(port) == "embedding")
        wanted |= {key: tuple(value.shape) for key, value in zip(names, _joined(inserts), strict=True)}
    fits(wanted, tensors, where)
    with torch.no_grad():
        for port, inserts in groups.items():
            a, b = (tensors[key].float() for key in _names(port.path, port_kind(port) == "embedding"))
            ranks = [insert["A"].shape[0] for insert in inserts]
            for insert, down, up in zip(inserts, a.split(ranks), b.split(ranks, 1), strict=True):
                insert["A"].copy_(down)
                insert["B"].copy_(_own_rows(up, insert, port.path, where))


def _own_rows(up: Tensor, insert: Insert, path: str, where: str) -> Tensor:
    if insert.rows is None:
        return up
    mine = gathered(up.T, insert.rows)
    if not torch.equal(spread(mine, insert.rows), up.T):
        raise AdapterError(f"{path}: B has values in rows of another role", where=where)
    return mine.T


def _joined(inserts: list[Insert]) -> tuple[Tensor, Tensor]:
    """One pair of factors for all inserts of a port: A [ranks, inputs], B [outputs, ranks]."""
    a = [insert["A"].detach() for insert in inserts]
    b = [insert["B"].detach() for insert in inserts]
    b = [up if insert.rows is None else spread(up.T, insert.rows).T for up, insert in zip(b, inserts, strict=True)]
    return torch.cat(a), torch.cat(b, 1)


def _by_port(adapter: Adapter) -> dict[Port, list[Insert]]:
    groups: dict[Port, list[Insert]] = {}
    for port, _, insert in adapter.inserts():
        groups.setdefault(port, []).append(insert)
    return groups


def _names(path: str, embedding: bool) -> tuple[str, str]:
    if embedding:
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _module_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The shortest list for `target_modules`: last parts of names where they mean exactly these modules."""
    hidden = tuple(f"{port.path}.{INSERTS}" for port in ports(model))
    everything = [path for path, _ in model.named_modules() if not path.startswith(hidden)] if hidden else []
    leaves = {path.rpartition(".")[2] for path in paths}
    same = {path for path in everything if path.rpartition(".")[2] in leaves}
    return sorted(leaves if same == set(paths) else paths)


def _chosen(settings: Mapping[str, Any], maps: dict[str, nn.Module], model: nn.Module, where: str) -> list[str]:
    """The modules that `target_modules` means; empty where other settings narrow it down and the tensors decide."""
    wanted = settings.get("target_modules")
    narrowed = any(settings.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if narrowed or not wanted:
        return []
    if wanted == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [path for path, module in maps.items() if port_kind(module) != "embedding" and module is not head]
    if isinstance(wanted, str):
        return matching(wanted, list(maps), f"{where}: target_modules")
    return [path for path in maps if any(path == end or path.endswith(f".{end}") for end in wanted)]


def _named(tensors: Iterable[str], maps: Iterable[str]) -> list[str]:
    held = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    return [path for path in maps if path in held]


def _by_pattern(patterns: Any, paths: list[str], where: str) -> dict[str, Any]:
    """What `rank_pattern` or `alpha_pattern` says of each module; the first pattern that matches decides."""
    found: dict[str, Any] = {}
    for pattern, value in dict(patterns or {}).items():
        if is_regex(pattern):
            hits = matching(rf"(.*\.)?({pattern})", paths, where)
        else:
            hits = [path for path in paths if path == pattern or path.endswith(f".{pattern}")]
        for path in hits:
            found.setdefault(path, value)
    return found


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


def _without_base(model: nn.Module, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Drops copies of base weights, which peft saves beside an adapted embedding, if they are this model's."""
    kept = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        try:
            module = model.get_submodule(owner.removesuffix(".base_layer"))
        except AttributeError:
            module = None
        base = module._parameters.get(leaf) if module is not None and port_kind(module) not in (None, "norm") else None
        if base is None:
            kept[key] = tensor
        elif base.shape != tensor.shape or not torch.equal(base.detach().cpu().float(), tensor.float()):
            raise AdapterError(f"it brings its own {owner}, which differs from the base's", where=where)
    return kept


def _default_alpha(method: LoRA) -> float:
    return _number(2 * method.rank if method.alpha is None else method.alpha)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)
