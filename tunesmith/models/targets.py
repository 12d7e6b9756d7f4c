"""Where a method acts: targets that a user names, matched against a family's role table and a model's modules.

The one idea: what matches nothing is an error that says what would. `check_targets` needs only a config and no torch;
`match` needs the model, which may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ConfigError, did_you_mean
from tunesmith.models.families import GROUPS, Family, family_of, setting
from tunesmith.models.patterns import is_regex, matching

if TYPE_CHECKING:
    from torch import nn

_SYNONYMS = {
    "query": "q", "key": "k", "value": "v", "output": "o", "out": "o", "attention": "attn", "self_attn": "attn",
    "ffn": "mlp", "feed_forward": "mlp", "embedding": "embed", "embeddings": "embed", "embed_tokens": "embed",
    "lm_head": "head", "layernorm": "norm", "norms": "norm", "fc1": "up", "fc2": "down",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Which output features of a fused map belong to a role: features `start` to `stop` of each of `groups` periods.

    One group is a plain slice (q of gpt2); gpt-neox interleaves q, k and v head by head, so it has a group a head.
    """

    groups: int
    period: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many output features these are."""
        return self.groups * (self.stop - self.start)


@dataclass(frozen=True)
class Target:
    """One place that a method acts on.

    Attributes:
        path: the module's name in the model.
        role: its role; for a map that was named by suffix and has none, the last part of its name.
        rows: the output features that are meant; None for all.
    """

    path: str
    role: str
    rows: Rows | None = None


def check_targets(config: Any, targets: Iterable[str], where: str = "method.targets") -> None:
    """Finds targets that cannot match, from a config alone, without torch.

    Roles and names are looked up in the family's table; regexes and families without one are left to `match`.

    Raises:
        ConfigError: a target matches nothing, or is a regex that does not compile.
    """
    family = family_of(config)
    known = [name for names in (*family.inside.values(), *family.outside.values()) for name in names]
    known += list(family.fused)
    for target in targets:
        if is_regex(target):
            matching(target, [], where)
        elif family.blocks and target not in family.roles:
            last = target.rpartition(".")[2]
            if not any(last in name.split(".") for name in known):
                raise nothing(target, family, where)


def match(model: nn.Module, family: Family, targets: Iterable[str], where: str = "method.targets") -> list[Target]:
    """The linear maps, embeddings and norms that targets name, in the order of the model, each once.

    A target is a role, a suffix of module names (`q_proj`, `layers.3.mlp.up_proj`) or a regex for whole names.
    `attn` and `mlp` are all linear maps of that sublayer; norms are meant by their role alone, never by a name.

    Raises:
        ConfigError: a target matches nothing, or names something that is neither a linear map nor an embedding.
    """
    from tunesmith.models.ports import port_kind

    places = {path: port_kind(module) for path, module in model.named_modules()}
    maps = {path: model.get_submodule(path) for path, kind in places.items() if kind not in (None, "norm")}
    table = placed(family, maps, model)
    table |= {path: [Target(path, "norm")] for path in norm_paths(model, family) if places[path] == "norm"}
    found: dict[str, dict[str, Target]] = {}
    for target in targets:
        hits = _role_hits(table, family, target) if target in family.roles else _name_hits(table, maps, target, where)
        if not hits:
            raise nothing(target, family, where)
        for hit in hits:
            found.setdefault(hit.path, {})[hit.role] = hit
    return [hit for path in places for hit in _whole_or_parts(found.get(path, {}))]


def placed(family: Family, maps: Mapping[str, Any], model: nn.Module) -> dict[str, list[Target]]:
    """Every map that has a role: path to its targets (several where roles share a fused map)."""
    config = getattr(model, "config", None)
    table: dict[str, list[Target]] = {}
    block = re.compile(r"(?:^|.*\.)(?:" + "|".join(map(re.escape, family.blocks)) + r")\.\d+\.(.+)")
    roles = {name: role for role, names in family.inside.items() for name in names if role != "norm"}
    for path, module in maps.items():
        inner = block.fullmatch(path) if family.blocks else None
        name = inner.group(1) if inner else ""
        if name in roles:
            table[path] = [Target(path, roles[name])]
        elif name in family.fused:
            parts, style = family.fused[name]
            size = output_features(module)
            table[path] = [Target(path, part, _rows(config, parts, style, part, size)) for part in parts]
        elif not inner:
            for role in ("embed", "head"):
                if any(path == end or path.endswith("." + end) for end in family.outside.get(role, ())):
                    table[path] = [Target(path, role)]
    return table


def block_paths(model: nn.Module, family: Family) -> list[str]:
    """Names of the blocks, from the first to the last (an encoder's before its decoder's)."""
    ends = tuple(family.blocks)
    block = re.compile(r"(?:^|.*\.)(?:" + "|".join(map(re.escape, ends)) + r")\.\d+") if ends else None
    return [path for path, _ in model.named_modules() if block and block.fullmatch(path)]


def linear_maps(model: nn.Module, family: Family) -> list[Target]:
    """Every linear map within blocks, fused ones whole, whether it has a role or not.

    Raises:
        ConfigError: there is none that is known.
    """
    from tunesmith.models.ports import port_kind

    blocks = tuple(f"{block}." for block in block_paths(model, family))
    paths = [path for path, module in model.named_modules() if port_kind(module) in ("linear", "conv1d")]
    inside = [Target(path, path.rpartition(".")[2]) for path in paths if path.startswith(blocks)]
    if not inside:
        raise ConfigError(f"the blocks of {family.name} are not known", where="method.kind", hint="lora names modules")
    return inside


def block_number(family: Family, path: str) -> int:
    """How many blocks of its side of the model lie below the one that a module is in; -1 for one outside."""
    ends = "|".join(map(re.escape, family.blocks))
    found = re.match(rf"(?:.*\.)?(?:{ends})\.(\d+)(?:\.|$)", path) if ends else None
    return int(found.group(1)) if found else -1


def norm_paths(model: nn.Module, family: Family) -> list[str]:
    """Names of the normalisation modules, within blocks and after them."""
    blocks = block_paths(model, family)
    inside = {f"{block}.{name}" for block in blocks for name in family.inside.get("norm", ())}
    ends = family.outside.get("norm", ())

    def after(path: str) -> bool:
        within = any(path.startswith(block + ".") for block in blocks)
        return not within and any(path == end or path.endswith("." + end) for end in ends)

    return [path for path, _ in model.named_modules() if path in inside or after(path)]


def output_features(module: nn.Module) -> int:
    """Output features of a linear map, embedding width of an embedding."""
    from tunesmith.models.ports import port_kind

    return int(module.weight.shape[0 if port_kind(module) == "linear" else 1])  # type: ignore[index,union-attr]


def input_features(module: nn.Module) -> int:
    """Input features of a linear map, rows of an embedding."""
    from tunesmith.models.ports import port_kind

    return int(module.weight.shape[1 if port_kind(module) == "linear" else 0])  # type: ignore[index,union-attr]


def nothing(target: str, family: Family, where: str) -> ConfigError:
    """The error for a target that matches nothing."""
    roles = " ".join(family.roles) or "none: name modules"
    hint = _SYNONYMS.get(target.lower(), "")
    hint = f"did you mean {hint}?" if hint in family.roles else did_you_mean(target, family.roles)
    if target in family.roles:
        hint = "this variant of the family has no such map; leave it out"
    return ConfigError(f"{target!r} matches nothing in {family.name}; roles are {roles}", where=where, hint=hint)


def _role_hits(table: Mapping[str, list[Target]], family: Family, role: str) -> list[Target]:
    wanted = GROUPS.get(role, (role,))
    return [target for targets in table.values() for target in targets if target.role in wanted]


def _name_hits(table: Mapping[str, list[Target]], maps: Iterable[str], name: str, where: str) -> list[Target]:
    if is_regex(name):
        paths = matching(name, list(maps), where)
    else:
        paths = [path for path in maps if path == name or path.endswith("." + name)]
    hits = []
    for path in paths:
        known = table.get(path, [])
        hits.append(known[0] if len(known) == 1 else Target(path, path.rpartition(".")[2]))
    return hits


def _whole_or_parts(hits: Mapping[str, Target]) -> list[Target]:
    # a fused map that was named as a whole includes the roles in it
    whole = [hit for hit in hits.values() if hit.rows is None]
    return whole or list(hits.values())


def _rows(config: Any, parts: Sequence[str], style: str, part: str, size: int) -> Rows:
    place = parts.index(part)
    if style == "equal":
        width = size // len(parts)
        return Rows(1, size, place * width, (place + 1) * width)
    heads = int(setting(config, "num_attention_heads"))
    if style == "heads":
        width = size // (heads * len(parts))
        return Rows(heads, width * len(parts), place * width, (place + 1) * width)
    pairs = int(setting(config, "num_key_value_heads") or heads)
    width = size // (heads + 2 * pairs)
    ends = (0, heads * width, (heads + pairs) * width, size)
    return Rows(1, size, ends[place], ends[place + 1])
