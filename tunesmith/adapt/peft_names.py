"""What peft's lists, patterns and names of modules mean, shared by every layout of its files.

`target_modules` is a list of name ends, a regex or a word; `rank_pattern` and its like are regexes; tensors are named
after the module behind one prefix. What the tensors are is in the module of each method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.models.copies import base_parameter
from tunesmith.models.patterns import is_regex, matching
from tunesmith.models.ports import INSERTS, port_kind, ports

PREFIX = "base_model.model."
TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def maps_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a low-rank change fits: linear maps and embeddings, by path."""
    return {path: module for path, module in model.named_modules() if port_kind(module) not in (None, "norm")}


def module_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The shortest list for `target_modules`: last parts of names where they mean exactly these modules."""
    hidden = tuple(f"{port.path}.{INSERTS}" for port in ports(model))
    everything = [path for path, _ in model.named_modules() if not path.startswith(hidden)] if hidden else []
    leaves = {path.rpartition(".")[2] for path in paths}
    same = {path for path in everything if path.rpartition(".")[2] in leaves}
    return sorted(leaves if same == set(paths) else paths)


def chosen(settings: Mapping[str, Any], maps: dict[str, nn.Module], model: nn.Module, where: str) -> list[str]:
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


def named(tensors: Iterable[str], maps: Iterable[str]) -> list[str]:
    """The modules that tensors with a low-rank change are named after."""
    held = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    return [path for path in maps if path in held]


def patterned(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """A pattern for the modules whose value is not the usual one: by the last part of names where that is enough."""
    by_leaf: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_leaf.setdefault(path.rpartition(".")[2], set()).add(value)
    found = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if value != usual:
            found[leaf if by_leaf[leaf] == {value} else path] = value
    return found


def by_pattern(patterns: Any, paths: list[str], where: str) -> dict[str, Any]:
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


def kept_modules(settings: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The modules with parameters that `modules_to_save` means; what fits nowhere is left to the tensors."""
    wanted = tuple(settings.get("modules_to_save") or ())
    hidden = tuple(f"{port.path}.{INSERTS}" for port in ports(model)) or ("\0",)
    found = []
    for path, module in model.named_modules():
        parts = path.split(".")
        above = (".".join(parts[: end + 1]) for end in range(len(parts)))
        if module._parameters and not path.startswith(hidden) and any(one.endswith(wanted) for one in above):
            found.append(path)
    return found if wanted else []


def without_base(model: nn.Module, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Drops copies of base weights, which peft saves beside an adapted embedding, if they are this model's."""
    kept = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        try:
            module = model.get_submodule(owner.removesuffix(".base_layer"))
        except AttributeError:
            module = None
        base = base_parameter(module, leaf) if module is not None else None
        if base is None:
            kept[key] = tensor
        elif base.shape != tensor.shape or not torch.equal(base.detach().cpu().float(), tensor.float()):
            raise AdapterError(f"it brings its own {owner}, which differs from the base's", where=where)
    return kept
