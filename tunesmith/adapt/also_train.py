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

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded

WHERE = "method.also_train"


def modules_of(loaded: Loaded, names: Iterable[str]) -> dict[str, list[str]]:
    """The modules that names mean: a role, or the end of a module's name, to their paths in the order of the model.

    Raises:
        ConfigError: a name means nothing, or only a part of a map that several roles share.
    """
    return {name: _modules(loaded, name) for name in names}


def train(adapter: Adapter, found: dict[str, list[str]], tie: bool) -> None:
    """Lets copies of all parameters of these modules train.

    Raises:
        ConfigError: `tie` where nothing is tied.
    """
    model = adapter.loaded.model
    tied = False
    for paths in found.values():
        mine = [f"{path}.{leaf}" for path in paths for leaf in _leaves(model.get_submodule(path))]
        for path in mine:
            if path in adapter.replaced:
                continue
            shared = sharing(model, path)
            tied = tied or len(shared) > 1
            adapter.train_copy(*(shared if tie else [other for other in shared if other in mine]))
    if tie and not tied:
        raise ConfigError("no weight of what is trained is shared", where="method.tie", hint="leave it out")


def _modules(loaded: Loaded, name: str) -> list[str]:
    model, family = loaded.model, loaded.family
    if name == "norm":
        found = norm_paths(model, family)
    elif name in family.roles:
        targets = match(model, family, [name], WHERE)
        parts = [target for target in targets if target.rows is not None]
        if parts:
            told = f"{name} is a part of {parts[0].path} in {family.name}, and whole parameters are trained"
            raise ConfigError(told, where=WHERE, hint=f"{parts[0].path.rpartition('.')[2]} is the whole")
        found = [target.path for target in targets]
    else:
        hidden = tuple(f"{port.path}.{INSERTS}" for port in ports(model))
        found = [
            path
            for path, module in model.named_modules()
            if (path == name or path.endswith(f".{name}")) and not path.startswith(hidden or "\0") and _leaves(module)
        ]
    if not found:
        raise nothing(name, family, WHERE)
    return found


def _leaves(module: nn.Module) -> list[str]:
    return [leaf for leaf in module._parameters if base_parameter(module, leaf) is not None]
