"""A list of stages read from one file: each is an ordinary run whose folder lies inside that of the list.

The one idea: `stage:NAME` is the folder that the stage will have, and shared sections are defaults, so that what is
left is one configuration a stage. Who runs them is `staged.py`; a file of one run is one stage without a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import REGISTRIES, Config, apply_override, build_config
from tunesmith.core.errors import ConfigError, Problems, TunesmithError, did_you_mean
from tunesmith.core.yaml import read_yaml

REFERENCE = "stage:"
# where a stage says one, it puts the others of the shared section aside
_INSTEAD = (
    ({"steps"}, {"epochs"}),
    ({"tokens_per_step", "micro_batch_tokens"}, {"rows_per_step", "micro_batch_rows"}),
)


@dataclass(frozen=True)
class Stage:
    """One run of a list; its name is empty where a file is of one run."""

    name: str
    config: Config


@dataclass(frozen=True)
class Stages:
    """The runs that a file describes, in their order.

    Attributes:
        file: where they are written.
        out: the folder of all.
    """

    file: str
    out: Path
    stages: tuple[Stage, ...]

    @property
    def is_list(self) -> bool:
        """Whether the file has a list, rather than one run."""
        return bool(self.stages[0].name)

    @property
    def only(self) -> Config:
        """The one run of a file without a list. Raises ConfigError where it has one."""
        if self.is_list:
            names = " ".join(stage.name for stage in self.stages)
            hint = "leave the option out, or give the stage a file of its own"
            raise ConfigError(f"this is for one run, and the file has the stages {names}", where=self.file, hint=hint)
        return self.stages[0].config

    def ahead(self, stage: Stage) -> dict[str, Config]:
        """The stages before one, by their folders: what it may begin with once they are there."""
        before = self.stages[: self.stages.index(stage)]
        return {one.config.out: one.config for one in before}

    def place(self, stage: Stage) -> str:
        """Where its keys are, for messages."""
        return f"{self.file}, stage {stage.name}" if self.is_list else self.file


def load_stages(path: Path | str, overrides: list[str] | None = None) -> Stages:
    """The runs of a YAML file. Raises ConfigError listing all problems, each with its stage.

    Args:
        overrides: `key.path=value` replaces in every stage what is no `stage:NAME`; `NAME.key.path=value` in one.
    """
    raw = read_yaml(path)
    if isinstance(raw, dict) and "stages" in raw:
        return build_stages(raw, str(path), overrides)
    if not isinstance(raw, dict):
        raise ConfigError("a configuration is a mapping of keys, as `tunesmith init` writes it", where=str(path))
    for override in overrides or []:
        apply_override(raw, override)
    config = build_config(raw, str(path))
    return Stages(str(path), Path(config.out), (Stage("", config),))


def build_stages(raw: Mapping[str, Any], where: str = "config", overrides: list[str] | None = None) -> Stages:
    """The runs of a plain dictionary with a list of stages. Raises ConfigError listing all problems."""
    raw = deepcopy(dict(raw))
    shared = {key: value for key, value in raw.items() if key != "stages"}
    entries = raw["stages"]
    _check_names(entries, where)
    names = [entry["name"] for entry in entries]
    out = _replaced(shared, names, overrides or [], entries)
    if not isinstance(out, str) or not out:
        raise ConfigError("the folder of all stages is required", where=f"{where}: out")
    problems, stages = Problems(), []
    for number, name in enumerate(names):
        place = f"{where}, stage {name}"
        try:
            settings = _merged(shared, entries[number])
            for key in ("model", "objective"):
                before = {one: f"{out}/{one}" for one in names[:number]}
                settings[key] = _referred(settings.get(key), before, names, f"{place}: {key}")
            stages.append(Stage(name, _config_of(settings, f"{out}/{name}", "out" in entries[number], place)))
        except ConfigError as error:
            problems.add(error)
    problems.raise_if_any()
    return Stages(where, Path(out), tuple(stages))


@contextmanager
def naming_stage(stages: Stages, stage: Stage) -> Iterator[None]:
    """Says of an error in the block in which file and stage it is."""
    try:
        yield
    except TunesmithError as error:
        known = error.where.replace(":", ".").partition(".")[0] in Config.model_fields
        if stages.is_list and not error.where.startswith(stages.file):
            error.where = ": ".join(filter(None, (stages.place(stage), error.where)))
        elif known:
            error.where = f"{stages.file}: {error.where}"
        raise


def _config_of(settings: Mapping[str, Any], out: str, names_out: bool, place: str) -> Config:
    """The configuration of a stage from its sections, references resolved. Raises ConfigError."""
    if names_out:
        raise ConfigError(f"is {out}; it is not set", where=f"{place}: out", hint="leave it out")
    given = {key: value for key, value in settings.items() if value is not None and key != "name"}
    config = build_config({**given, "out": out}, place)
    if config.layout.processes > 1:
        hint = "give the stage a file of its own, and `tunesmith launch` it"
        raise ConfigError("a list of stages runs in one process", where=f"{place}: layout", hint=hint)
    return config


def _check_names(entries: Any, where: str) -> None:
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("a list of sections is needed, each with a name", where=f"{where}: stages")
    seen: set[str] = set()
    for number, entry in enumerate(entries, 1):
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            told = f"stage {number}: a name of letters, digits, - and _ is needed, got {name!r}"
            raise ConfigError(told, where=f"{where}: stages")
        if name in seen or name in Config.model_fields:
            why = "is there twice" if name in seen else "is the name of a section"
            raise ConfigError(f"the name {name!r} {why}", where=f"{where}: stages")
        seen.add(name)


def _replaced(shared: dict[str, Any], names: list[str], overrides: list[str], entries: list[dict[str, Any]]) -> Any:
    """Puts overrides into the shared sections and those of stages; answers the folder of all."""
    of_one = dict(zip(names, entries, strict=True))
    for override in overrides:
        name, dot, rest = override.partition(".")
        if dot and name in of_one:
            apply_override(of_one[name], rest)
            continue
        apply_override(shared, override)
        keys = override.partition("=")[0].split(".")
        for entry in entries:
            held = _held(entry, keys)
            if held is not None and not str(held).startswith(REFERENCE):
                apply_override(entry, override)
    return shared.get("out")


def _held(entry: Any, keys: list[str]) -> Any:
    for key in keys:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's sections over the shared ones, key by key; one of another kind takes their place."""
    found = deepcopy(dict(shared))
    for key, value in own.items():
        before, after = found.get(key), value
        if key in REGISTRIES:
            before, after = ({"kind": one} if isinstance(one, str) else one for one in (before, after))
        if not (isinstance(before, dict) and isinstance(after, dict)):
            found[key] = after
            continue
        if after.get("kind", before.get("kind")) != before.get("kind"):
            found[key] = after
            continue
        aside = {name for one in _INSTEAD for a, b in (one, one[::-1]) if a & set(after) for name in b}
        found[key] = {**{name: one for name, one in before.items() if name not in aside}, **after}
    return found


def _referred(value: Any, folders: Mapping[str, str], names: list[str], where: str) -> Any:
    """A section with the folders that its `stage:NAME` stand for. Raises ConfigError for one that is not before."""
    if isinstance(value, dict):
        return {key: _referred(one, folders, names, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list):
        return [_referred(one, folders, names, where) for one in value]
    if not isinstance(value, str) or not value.startswith(REFERENCE):
        return value
    name = value.removeprefix(REFERENCE)
    if name not in folders:
        why = "does not come before this one" if name in names else "is not there"
        told = f"the stage {name!r} {why}; before it are {' '.join(folders) or 'none'}"
        raise ConfigError(told, where=where, hint=did_you_mean(name, folders))
    return folders[name]
