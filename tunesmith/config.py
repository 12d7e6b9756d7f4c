"""A run as one frozen value: read from YAML with overrides, every problem shown together.

The sections live beside what they configure; here they are put together, checked against each other and worded.
Nothing in this file or below it imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError

from tunesmith.adapt.method import Method
from tunesmith.adapt.methods import METHODS
from tunesmith.core.errors import ConfigError, Problems, did_you_mean
from tunesmith.core.section import Section
from tunesmith.core.yaml import read_yaml, read_yaml_text
from tunesmith.data.section import DataSection
from tunesmith.evaluate.metrics import OF_PROBLEM
from tunesmith.evaluate.rewards import open_rewards
from tunesmith.evaluate.section import EvaluateSection
from tunesmith.objectives.objective import Objective
from tunesmith.objectives.objectives import OBJECTIVES
from tunesmith.parallel.layout import AutoLayout, LayoutSection
from tunesmith.parallel.limits import refusals
from tunesmith.train.section import PrecisionSection, TrainSection


class Config(Section):
    """Everything a run depends on.

    Attributes:
        model: bundled name, folder with a Hugging Face checkpoint, .gguf file, or hub id.
        data: what it is fed.
        method: which numbers may change.
        objective: what is minimised.
        train: how long, how fast, when to save.
        precision: in what numbers.
        layout: spread how; `auto` lets the planner choose.
        evaluate: what is measured before, during and after.
        log: where metrics go besides metrics.jsonl.
        out: the run folder.
    """

    model: str = Field(min_length=1)
    data: DataSection
    method: SerializeAsAny[Method]
    objective: SerializeAsAny[Objective]
    train: TrainSection
    precision: PrecisionSection = PrecisionSection()
    layout: Annotated[LayoutSection, BeforeValidator(lambda value: AutoLayout() if value == "auto" else value)] = (
        LayoutSection()
    )
    evaluate: EvaluateSection = EvaluateSection()
    log: list[Literal["tensorboard"]] = ["tensorboard"]
    out: str = Field(min_length=1)


REGISTRIES = {"method": METHODS, "objective": OBJECTIVES}
# pydantic's words that a user of YAML would not understand
_EXPECTED = {
    "bool_type": "should be true or false",
    "string_type": "should be text; put it in quotes",
    "model_type": "should be a section of keys",
    "dict_type": "should be a section of keys",
    "too_short": "needs at least {min_length} entries",
}
DEFAULTS: dict[str, Any] = {"method": "lora", "objective": "sft"}


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """The configuration in a YAML file with `key.path=value` overrides. Raises ConfigError listing all problems."""
    raw = read_yaml(path)
    where = str(path)
    if not isinstance(raw, dict):
        raise ConfigError("a configuration is a mapping of keys, as `tunesmith init` writes it", where=where)
    for override in overrides or []:
        apply_override(raw, override)
    return build_config(raw, where)


def build_config(raw: dict[str, Any], where: str = "config") -> Config:
    """The configuration in a plain dictionary. Raises ConfigError listing all problems."""
    if "stages" in raw:
        hint = "`tunesmith tune`, `check` and `plan` take it"
        raise ConfigError("a list of stages; one run is needed here", where=f"{where}: stages", hint=hint)
    problems = Problems()
    values: dict[str, Any] = {**DEFAULTS, **raw}
    for name, registry in REGISTRIES.items():
        values[name] = _of_kind(values[name], registry, f"{where}: {name}", problems)
    for name in [name for name in REGISTRIES if values[name] is None]:
        # a placeholder of the right kind, so that the other sections are still checked
        values[name] = registry_default(name)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for problem in worded(error, Config, where):
            problems.add(problem)
    problems.raise_if_any()
    for problem in contradictions(config, where):
        problems.add(problem)
    problems.raise_if_any()
    return config


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Puts the file in front of a key that is found wrong in the block, as errors of reading it have it."""
    try:
        yield
    except ConfigError as error:
        if error.where.replace(":", ".").partition(".")[0] in Config.model_fields:
            error.where = f"{path}: {error.where}"
        raise


def registry_default(name: str) -> Any:
    """The default entry of a registry, with its default settings."""
    return REGISTRIES[name].load(DEFAULTS[name])()


def _of_kind(value: Any, registry: Any, where: str, problems: Problems) -> Any:
    """`x` or `{kind: x, ...}` as the section of that kind; None after adding a problem."""
    settings = {"kind": value} if isinstance(value, str) else value
    if isinstance(settings, BaseModel):
        return settings
    if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
        names = " ".join(registry.names())
        problems.add(ConfigError(f"expected {{kind: X, ...}}, got {value!r}; kinds are {names}", where=where))
        return None
    try:
        kind = registry.load(settings["kind"], where=f"{where}.kind")
        return kind.model_validate(settings)
    except ConfigError as error:
        problems.add(error)
    except ValidationError as error:
        for problem in worded(error, kind, where):
            problems.add(problem)
    return None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets `key.path=value` in a plain configuration; the value is YAML."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r} is not of the form key.path=value", where="command line")
    place = raw
    for key in keys[:-1]:
        inner = place.get(key)
        if isinstance(inner, str) and key in REGISTRIES:
            inner = {"kind": inner}
        place[key] = inner if isinstance(inner, dict) else {}
        place = place[key]
    place[keys[-1]] = read_yaml_text(text, where=f"command line: {path}")


def contradictions(config: Config, where: str) -> list[ConfigError]:
    """Settings that fight each other or would have no effect."""
    found = []

    def say(key: str, message: str, hint: str = "") -> None:
        found.append(ConfigError(message, where=f"{where}: {key}", hint=hint))

    judged = config.evaluate
    for key in ("metrics", "every", "shots", "rows"):
        if getattr(judged, key) and not config.data.eval:
            say(f"evaluate.{key}", "nothing to evaluate on: data.eval is not set", "set data.eval")
    if config.objective.predicts or config.objective.compares:
        found += _unfit_for_labels(config, where)
    if config.objective.needs_reference and config.method.trains_all:
        told = f"compares with the model as it was, and method {config.method.kind} changes that model itself"
        say("objective", told, "set method to lora or top_layers, or objective to {kind: dpo, loss: orpo}")
    if config.objective.samples:
        found += _unfit_for_samples(config, where)
    for key, message, hint in (*_unfit_stop(config), *_unfit_teaching(config)):
        say(key, message, hint)
    for key, message, hint in refusals(config):
        say(key, message, hint)
    if config.precision.compute == "fp32" and not config.precision.master:
        say("precision.master", "has no effect with compute: fp32, which needs no copies", "leave it out")
    base = config.precision.base
    if base != "same" and config.method.trains_all:
        told = f"{base} holds frozen weights, and method {config.method.kind} trains them all"
        say("precision.base", told, "set it to same, or method to lora")
    return found


def _unfit_stop(config: Config) -> Iterator[tuple[str, str, str]]:
    """Key, message and hint of what an early stop cannot do."""
    stop, judged = config.train.stop, config.evaluate
    if stop is not None and not judged.every:
        yield "train.stop", "needs evaluations during training", "set evaluate.every to a number of steps"
    if stop is not None and stop.metric not in ("loss", *judged.metrics):
        known = " ".join(dict.fromkeys(("loss", *judged.metrics)))
        told = f"{stop.metric!r} is not measured; there are {known}"
        yield "train.stop.metric", told, "add it to evaluate.metrics"


def _unfit_teaching(config: Config) -> Iterator[tuple[str, str, str]]:
    """Key, message and hint of what needs a teacher, or cannot be with one."""
    objective = config.objective
    if "divergence" in config.evaluate.metrics and objective.kind != "distill":
        yield "evaluate.metrics", "divergence is from a teacher, which objective: distill alone has", "leave it out"
    if objective.kind == "distill" and config.layout.processes > 1 and not objective.samples:
        yield "layout", "distill runs in one process", "leave it out"


def _unfit_for_labels(config: Config, where: str) -> list[ConfigError]:
    """Metrics that do not judge what a head predicts or compares, and settings of prompts, which it is not given."""
    kind, objective = config.objective.predicts or "reward", config.objective
    known = OF_PROBLEM[kind]
    wrong = [name for name in config.evaluate.metrics if name not in known]
    told = f"{' '.join(wrong)}: not of predictions ({kind}); there are {' '.join(known)}"
    found = [ConfigError(told, where=f"{where}: evaluate.metrics")] if wrong else []
    shots = config.evaluate.shots and "evaluate.shots"
    template = config.data.template != "auto" and objective.compares is None and "data.template"
    for key in filter(None, (shots, template)):
        does = "asks for no answers" if objective.compares else "renders no prompts"
        told = f"has no effect with objective: {objective.kind}, which {does}"
        found.append(ConfigError(told, where=f"{where}: {key}", hint="leave it out"))
    return found


def _unfit_for_samples(config: Config, where: str) -> list[ConfigError]:
    """What cannot be with an objective over the model's own completions, or has no effect there."""
    objective: Any = config.objective
    rewards = getattr(objective, "reward", ())
    told = [
        (not config.train.rows_per_step, "train.rows_per_step", "counts prompts and is needed: completions have no "
         "length before they are written", "for instance rows_per_step: 8, micro_batch_rows: 4"),
        (bool(getattr(config.method, "dropout", 0)), "method.dropout", "the policy that learns would be another than "
         "the one that wrote", "set it to 0"),
        (bool(getattr(objective, "kl", 0)) and config.method.trains_all, "objective.kl", f"{config.method.kind} "
         "changes the model itself: there is no reference beside it", "set it to 0, or method to lora"),
        (any(one["kind"] == "run" for one in rewards) and config.method.trains_all, "objective.reward",
         f"{config.method.kind} changes the base that the reward model stands on", "set method to lora"),
        (bool(config.train.cache_trunk), "train.cache_trunk", "completions are new in every step", "leave it out"),
    ]  # fmt: skip
    found = [ConfigError(text, where=f"{where}: {key}", hint=hint) for wrong, key, text, hint in told if wrong]
    try:
        open_rewards(rewards, f"{where}: objective.reward")
    except ConfigError as error:
        found.append(error)
    return found


def worded(error: ValidationError, section: type[BaseModel], where: str) -> list[ConfigError]:
    """pydantic's findings as one ConfigError each, naming the key path, the value and what was expected."""
    details = error.errors(include_url=False)
    # a list whose entries are wrong is called too short, too; the entries say it
    inner = {detail["loc"][:-1] for detail in details}
    told = [detail for detail in details if not (detail["type"] == "too_short" and detail["loc"] in inner)]
    return [_worded(detail, section, where) for detail in told]


def _worded(detail: Any, section: type[BaseModel], where: str) -> ConfigError:
    path = [str(part) for part in detail["loc"]]
    # `where` is a file, or a file and the section that is being read
    place = (where + (".", ": ")[": " not in where] + ".".join(path)) if path else where
    if detail["type"] == "extra_forbidden":
        keys = _keys_at(section, path[:-1])
        known = f"; keys here are {' '.join(keys)}" if keys else ""
        return ConfigError(f"unknown key {path[-1]!r}{known}", where=place, hint=did_you_mean(path[-1], keys))
    if detail["type"] == "missing":
        return ConfigError("this key is required", where=place)
    if detail["type"] == "value_error":
        # our own words: they name the value themselves
        return ConfigError(detail["msg"].removeprefix("Value error, "), where=place)
    message = _EXPECTED.get(detail["type"], "")
    message = message.format(**detail.get("ctx", {})) or detail["msg"].removeprefix("Input ")
    value = detail.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f", got {_short(value)}"
    return ConfigError(f"{message[:1].lower()}{message[1:]}{shown}", where=place)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _keys_at(section: type[BaseModel], path: list[str]) -> list[str]:
    """The keys a section has at a path, as far as its type says."""
    for part in path:
        if part.isdigit():  # an entry of a list, whose type is known
            continue
        field = section.model_fields.get(part)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        section = inner[0]
    return [field.alias or name for name, field in section.model_fields.items()]


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, every default written out."""
    return config.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Key paths whose values differ, with both values."""
    found = []
    for key in sorted({*old, *new}):
        place, before, after = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{place}.")
        elif before != after:
            found.append(f"{place}: {before!r} -> {after!r}")
    return found
