"""What a sweep tries: for each kind of method, the setting that grows it, and its values that fit a budget.

The one idea: a count is what the method attaches on the meta device, never a formula; a formula only says where to
look. Running what was found is `sweep.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.adapt.methods import METHODS
from tunesmith.core.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

BUDGET, REFERENCE, RANKS = "budget", "reference", "ranks"


@dataclass(frozen=True)
class Space:
    """How one kind of method comes to a size.

    Attributes:
        lr: its learning rate as a multiple of the configuration's, which is meant for LoRA. These are conventions of
            the field (papers and defaults of each method), not the result of a search.
        knob: the setting that grows it; empty for a method whose size is what it is.
        most: the largest value of the knob that makes sense.
        variants: settings that are tried beside it.
    """

    lr: float = 1.0
    knob: str = ""
    most: int = 1
    variants: tuple[dict[str, Any], ...] = ({},)


def _roles(*groups: str) -> tuple[dict[str, Any], ...]:
    return tuple({"targets": group.split()} for group in groups)


_KINDS_OF_LORA = tuple(_roles("q v")[0] | kind for kind in ({"dora": True}, {"init": "pissa"}))

SPACES: dict[str, Space] = {
    "lora": Space(1.0, "rank", 1024, (*_roles("q", "q v", "q k v o", "attn mlp"), *_KINDS_OF_LORA)),
    "adapter": Space(1.0, "size", 4096, tuple({"style": name} for name in ("houlsby", "lin", "pfeiffer", "parallel"))),
    "prefix_layer": Space(10.0, "length", 256),
    "prefix_embed": Space(20.0, "prefix", 256),
    "prompt": Space(20.0, "length", 200),
    "subspace": Space(10.0, "dimension", 2_000_000),
    "bitfit": Space(2.0),
    "ia3": Space(10.0),
    "fpt": Space(0.5),
    "top_layers": Space(0.2),
    "linear_probe": Space(5.0),
    "lp_ft": Space(0.2),
    "full": Space(0.2),
}
# tried only when they are asked for: a random subspace asks another question, and is slow
ON_REQUEST = ("subspace",)
GRID = _roles("q", "k", "v", "o", "q k", "q v", "q k v o")
RANK_ROWS = _roles("q", "q v", "q k v o")
DEFAULT_RANKS = (1, 2, 4, 8, 64)


def title(kind: str, settings: dict[str, Any]) -> str:
    """A name for a row and a folder: lora-qv-r16, adapter-pfeiffer-64, full."""
    parts = [kind]
    for name, value in settings.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            parts.append(_joined(value))
        elif isinstance(value, bool):
            parts += [name] if value else []
        else:
            parts.append(f"r{value}" if name == "rank" else str(value))
    return "-".join(parts)


def _joined(names: Iterable[str]) -> str:
    names = list(names)
    return ("" if all(len(name) == 1 for name in names) else "+").join(names)


# what somebody may ask for by name: a kind with all of its variants, or one variant
NAMED = {kind: [(kind, variant) for variant in space.variants] for kind, space in SPACES.items()} | {
    title(kind, variant): [(kind, variant)] for kind, space in SPACES.items() for variant in space.variants
}


@dataclass(frozen=True)
class Setting:
    """A method with all its settings: one row of the table.

    Attributes:
        name: of the row and, with a seed, of its runs.
        method: the section of the configuration.
        parameters: what it trains, the prediction head aside.
        why: budget (fits it), reference (its size is not free), ranks (a cell of the table of ranks).
        lr_factor: multiple of the configuration's learning rate.
        note: for the reader of the table.
    """

    name: str
    method: Method
    parameters: int
    why: str = BUDGET
    lr_factor: float = 1.0
    note: str = ""


@dataclass
class Choice:
    """What is tried, and what is not with the reason."""

    settings: list[Setting] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, setting: Setting) -> None:
        """Adds a row, unless it is there already."""
        if setting.name not in {one.name for one in self.settings}:
            self.settings.append(setting)


class Counter:
    """Counts what methods train on one model, without its weights."""

    def __init__(self, open_meta: Callable[[], Loaded]) -> None:
        """`open_meta` gives the model on the meta device."""
        self._open, self._loaded = open_meta, open_meta()

    def __call__(self, method: Method) -> int:
        """Parameters of a method without a prediction head. Raises ConfigError or ModelError where it does not fit."""
        adapter = method.attach(self._loaded)
        found = sum(parameter.numel() for parameter in adapter.changes.values())
        try:
            adapter.detach()
        except ModelError:  # it has changed the model itself
            self._loaded = self._open()
        return found


@dataclass(frozen=True)
class Wanted:
    """What somebody asks a sweep to try.

    Attributes:
        budget: parameters; None for the table of ranks alone.
        within: share of the budget that a method may be off.
        methods: kinds, or one variant of a kind by its name, as lora-qv; all kinds that there are without any.
        grid: the budget over weight types of LoRA, and the table of ranks.
        ranks: ranks of that table; those of the LoRA paper with `grid` when empty.
    """

    budget: int | None
    within: float = 0.05
    methods: tuple[str, ...] = ()
    grid: bool = False
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in NAMED:
                kinds = " ".join(SPACES)
                told = f"{name!r} is no method of a sweep; there are {kinds}, and variants as lora-qv"
                raise ConfigError(told, where="--methods", hint=did_you_mean(name, NAMED))
        if self.budget is None and not self.ranks:
            raise ConfigError("say how many parameters, as in --budget 1.2M", where="--budget")

    @property
    def tries(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and variant of everything to try besides the grid and the table of ranks."""
        names = self.methods
        if not names and not self.grid and self.budget is not None:
            names = tuple(kind for kind in SPACES if kind not in ON_REQUEST)
        return [found for name in names for found in NAMED[name]]

    @property
    def kinds(self) -> set[str]:
        """The kinds that are tried."""
        return {kind for kind, _ in self.tries} | ({"lora"} if self.grid or self.ranks else set())

    @property
    def rank_table(self) -> tuple[int, ...]:
        return self.ranks or (DEFAULT_RANKS if self.grid else ())


def choose(wanted: Wanted, count: Counter) -> Choice:
    """Everything that is to be tried on the model behind `count`."""
    choice = Choice()
    for kind, variant in wanted.tries:
        if not SPACES[kind].knob:
            _add(choice, count, kind, variant, REFERENCE, "")
        elif wanted.budget is not None:
            _fill(choice, count, kind, variant, wanted.budget, wanted.within)
    if wanted.grid and wanted.budget is not None:
        for variant in GRID:
            _fill(choice, count, "lora", variant, wanted.budget, wanted.within)
    for variant in RANK_ROWS if wanted.rank_table else ():
        for rank in wanted.rank_table:
            _add(choice, count, "lora", {**variant, "rank": rank}, RANKS, "")
    return choice


def _fill(choice: Choice, count: Counter, kind: str, variant: dict[str, Any], budget: int, within: float) -> None:
    """Adds the value of the knob that comes nearest to the budget, if it is near enough."""
    space = SPACES[kind]
    label = title(kind, variant)
    try:
        value, parameters = _nearest(count, kind, variant, budget)
    except (ConfigError, ModelError) as error:
        choice.left_out[label] = error.message
        return
    settings = {**variant, space.knob: value}
    if abs(parameters - budget) <= within * budget:
        _add(choice, count, kind, settings, BUDGET, "")
    elif value == space.most and parameters < budget:
        default = getattr(METHODS.load(kind)(), space.knob)
        note = f"below the budget: {space.knob} {space.most} is {parameters:,}"
        _add(choice, count, kind, {**variant, space.knob: default}, REFERENCE, note)
    else:
        choice.left_out[label] = f"nearest is {space.knob} {value}: {parameters:,} parameters"


def _nearest(count: Counter, kind: str, variant: dict[str, Any], budget: int) -> tuple[int, int]:
    """The value of the knob whose count is nearest to the budget, and its count."""
    space = SPACES[kind]

    def counted(value: int) -> int:
        return count(_section(kind, {**variant, space.knob: value}))

    # every knob so far adds a fixed number a notch; were one to add another, the budget's check would leave it out
    first = counted(1)
    notch = max(1, counted(2) - first)
    value = min(space.most, max(1, 1 + round((budget - first) / notch)))
    return value, counted(value)


def _add(choice: Choice, count: Counter, kind: str, settings: dict[str, Any], why: str, note: str) -> None:
    label = title(kind, settings)
    try:
        method = _section(kind, settings)
        parameters = count(method)
        told = note or ("" if parameters else "the prediction head alone")
        choice.add(Setting(label, method, parameters, why, SPACES[kind].lr, told))
    except (ConfigError, ModelError) as error:
        choice.left_out[label] = error.message


def _section(kind: str, settings: dict[str, Any]) -> Method:
    section: Method = METHODS.load(kind).model_validate({"kind": kind, **settings})
    return section
