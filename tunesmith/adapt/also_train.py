"""Base parameters that train beside low-rank changes: what `also_train` names, as copies that take their place.

Places of one role that share a weight share its copy; a weight that roles share (embedding and head) is untied, unless
it is to stay tied. The copies themselves are `models/copies.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tunesmith.core.errors import ConfigError
from tunesmith.models.copies import base_parameter, sharing
from tunesmith.models.ports import INSERTS, ports
from tunesmith.models.targets import match, norm_paths, nothing

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.models.load import Loaded

WHERE = "method.also_train"


def groups(loaded: Loaded, names: Iterable[str], tie: bool, taken: set[str]) -> list[list[str]]:
    """The parameters that names mean, by path; those of a group are one in the base and train as one copy.

    Args:
        names: roles, or ends of module names.
        tie: a weight that other places share stays shared with them.
        taken: modules with a low-rank change, which can not train whole as well.

    Raises:
        ConfigError: a name means nothing, a part of a map, or what is taken.
    """
    found: list[list[str]] = []
    for name in names:
        paths = _modules(loaded, name)
        clash = [path for path in paths if path in taken]
        if clash:
            raise ConfigError(f"{clash[0]} is a target, too", where=WHERE, hint="leave it out there or here")
        mine = [f"{path}.{leaf}" for path in paths for leaf in _leaves(loaded.model.get_submodule(path))]
        for path in mine:
            if not any(path in group for group in found):
                shared = sharing(loaded.model, path)
                found.append(shared if tie else [other for other in shared if other in mine])
    return found


def _modules(loaded: Loaded, name: str) -> list[str]:
    model, family = loaded.model, loaded.family
    hidden = tuple(f"{port.path}.{INSERTS}" for port in ports(model)) or ("\0",)
    if name == "norm":
        found = [path for path in norm_paths(model, family) if not path.startswith(hidden)]
    elif name in family.roles:
        targets = match(model, family, [name], WHERE)
        parts = [target for target in targets if target.rows is not None]
        if parts:
            told = f"{name} is a part of {parts[0].path} in {family.name}, and whole parameters are trained"
            raise ConfigError(told, where=WHERE, hint=f"{parts[0].path.rpartition('.')[2]} is the whole")
        found = [target.path for target in targets]
    else:
        found = [
            path
            for path, module in model.named_modules()
            if (path == name or path.endswith(f".{name}")) and not path.startswith(hidden) and _leaves(module)
        ]
    if not found:
        raise nothing(name, family, WHERE)
    return found


def _leaves(module: nn.Module) -> list[str]:
    return [leaf for leaf in module._parameters if base_parameter(module, leaf) is not None]
