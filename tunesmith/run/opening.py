"""Opens whatever a user names: a model, a run folder, or an adapter folder, ready to write text.

A run brings its base model, its adapter and its template along; everything else is a model by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import read_json
from tunesmith.core.problem import HEAD_KEY, HEAD_SETTINGS, Problem, read_problem
from tunesmith.data.codec import Codec
from tunesmith.data.templates import Template, open_template
from tunesmith.evaluate.metrics import OF_PROBLEM
from tunesmith.evaluate.stage_list import holds_stages, names_in
from tunesmith.models.families import Family, family_of
from tunesmith.run.folder import RunFolder

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Base, Loaded
    from tunesmith.models.route import Route


@dataclass(frozen=True)
class Named:
    """What a name stands for, before weights are loaded.

    Attributes:
        name: as the user gave it.
        model: source of the base model, for `models.source.resolve`.
        adapter: folder of the adapter, or None.
        template: the template a run was trained with, or None.
        max_length: tokens of a row that a run was trained with, or None.
        objective: the section of a run's objective; empty where there is none.
    """

    name: str
    model: str
    adapter: Path | None = None
    template: str | None = None
    max_length: int | None = None
    objective: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What is known of a model before its weights are loaded.

    Attributes:
        named: what the name stands for.
        folder: of the base model.
        codec: its tokenizer.
        chosen: name of the template that conversations are written with, or `auto`.
        plain: the rows are bare prompts, so that `auto` means no template.
        family: its role table; its kind says whether it writes.
        problem: what the prediction head of the run predicts; None where it has none.
    """

    named: Named
    folder: Path
    codec: Codec
    chosen: str
    plain: bool
    family: Family
    problem: Problem | None = None

    @cached_property
    def template(self) -> Template:
        """How conversations are written for it. Raises ConfigError where it writes none."""
        self.check_writes()
        return open_template(self.chosen, self.codec, plain=self.plain)

    def check_writes(self) -> None:
        """Raises ConfigError for a model that predicts labels, or an encoder."""
        if self.problem is not None:
            hint = f"tunesmith evaluate {self.named.name} --data ROWS --metrics {OF_PROBLEM[self.problem.kind][1]}"
            raise ConfigError(f"it predicts {self.problem.line()}; it writes no text", where=self.named.name, hint=hint)
        if self.family.kind == "encoder":
            told = f"{self.family.name} is an encoder; it writes no text"
            raise ConfigError(told, where=self.named.name, hint="objective: predict gives it a head for labels")


@dataclass(frozen=True)
class Opened:
    """A model with its weights.

    Attributes:
        name: as the user gave it.
        loaded: weights, family, folder.
        route: what acts: the base, or the adapter of the run.
        codec: its tokenizer.
        adapter: of a run that has one.
    """

    name: str
    loaded: Loaded
    route: Route
    codec: Codec
    adapter: Adapter | None = None


def find(source: str) -> Named:
    """What `source` stands for; of stages, the last. Raises ModelError where a run has no result yet."""
    folder = Path(source)
    if holds_stages(folder):
        return replace(find(str(folder / names_in(folder)[-1])), name=source)
    run = RunFolder(folder)
    if run.exists:
        config = run.config
        data = config["data"] if isinstance(config["data"], dict) else {}
        known = str(data.get("template", "auto")), data.get("max_length"), dict(config.get("objective") or {})
        if (folder / "model" / "config.json").exists():
            return Named(source, str(folder / "model"), None, *known)
        if (folder / "adapter" / "adapter_config.json").exists():
            base = _base(folder / "adapter") or str(config["model"])
            return Named(source, base, folder / "adapter", *known)
        raise ModelError(
            "this run has no result yet", where=source, hint="finish it with `tunesmith tune ... --resume`"
        )
    if (folder / "adapter_config.json").exists():
        named = _named_base(folder)
        if not named:
            raise ModelError("does not name its base model", where=str(folder / "adapter_config.json"))
        return Named(source, named, folder)
    return Named(source, source)


def _base(adapter: Path) -> str:
    """The base model's folder as the adapter remembers it (the run may be used from elsewhere); empty when gone."""
    base = _named_base(adapter)
    return base if base and Path(base).is_dir() else ""


def _named_base(adapter: Path) -> str:
    path = adapter / "adapter_config.json"
    settings = read_json(path, ModelError)
    if not isinstance(settings, dict):
        raise ModelError("not the configuration of an adapter", where=str(path))
    return str(settings.get("base_model_name_or_path") or "")


def look(source: str, *, template: str = "auto", plain: bool = False) -> Seen:
    """Everything about `source` that needs no weights, and no torch, so that mistakes are told at once.

    Args:
        template: `auto` takes the run's own, then the model's.
        plain: the rows are bare prompts, so that `auto` means no template.

    Raises: ModelError, ConfigError.
    """
    from tunesmith.models.folder import validate_folder
    from tunesmith.models.source import resolve

    named = find(source)
    folder = resolve(named.model)
    validate_folder(folder)
    codec = Codec.open(folder)
    chosen = template if template != "auto" else named.template or "auto"
    family = family_of(read_json(folder / "config.json", ModelError))
    seen = Seen(named, folder, codec, chosen, plain, family, _problem(named.adapter, folder))
    if seen.problem is None and family.kind != "encoder":
        seen.template  # noqa: B018  what is wrong with it is told here
    return seen


def _held(adapter: Path | None) -> Base:
    """In what the base was held that an adapter was trained on: on another one it would say something else."""
    settings = read_json(adapter / "adapter_config.json", ModelError) if adapter is not None else None
    told = settings.get("tunesmith_base") if isinstance(settings, dict) else None
    held = told.get("held", "same") if isinstance(told, dict) else "same"
    if held not in ("same", "bf16", "int8", "nf4"):
        raise ModelError(f"a base held in {held!r} is not known here", where=str(adapter))
    return held  # type: ignore[return-value]


def _problem(adapter: Path | None, folder: Path) -> Problem | None:
    """What the head beside an adapter, or in a model's folder, predicts; None where there is none."""
    path = folder / HEAD_SETTINGS if adapter is None else adapter / "adapter_config.json"
    settings = read_json(path, ModelError) if path.is_file() else None
    if adapter is not None:
        settings = settings.get(HEAD_KEY) if isinstance(settings, dict) else None
    return None if settings is None else read_problem(settings, str(path))


def open_model(source: str | Seen, *, template: str = "auto", precision: str = "auto", plain: bool = False) -> Opened:
    """Loads what `source` stands for; the other arguments are those of `look`.

    Args:
        precision: fp32, bf16, fp16 or auto.

    Raises: ModelError, AdapterError, ConfigError.
    """
    seen = look(source, template=template, plain=plain) if isinstance(source, str) else source
    from tunesmith.models.heads import open_head
    from tunesmith.models.load import load
    from tunesmith.models.route import BASE
    from tunesmith.train.precision import resolve as resolve_precision
    from tunesmith.train.section import PrecisionSection

    compute = resolve_precision(PrecisionSection.model_validate({"compute": precision}))
    loaded = load(str(seen.folder), dtype=compute, base=_held(seen.named.adapter))
    adapter = None
    if seen.named.adapter is not None:
        from tunesmith.adapt.store import load_adapter

        adapter = load_adapter(loaded, seen.named.adapter)
    elif seen.problem is not None:
        open_head(loaded, seen.folder)
    route = adapter.route if adapter else BASE
    return Opened(seen.named.name, loaded, route, seen.codec, adapter)
