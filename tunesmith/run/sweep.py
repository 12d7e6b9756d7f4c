"""A sweep: many methods under one budget of parameters, several seeds each, one table.

The one idea: trials are ordinary runs in folders of their own, and everything said about them is read back from there;
so a sweep that is stopped, killed or extended by a seed goes on with what is missing. Here it is chosen and planned;
what may be tried is `spaces.py`, running it is `sweeping.py`, a trial is `trials.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.adapt.full import Full
from tunesmith.config import Config, as_dict, build_config
from tunesmith.core.amounts import in_bytes, in_time
from tunesmith.core.errors import CheckpointError, ConfigError, ModelError
from tunesmith.core.files import read_json
from tunesmith.models.families import family_of
from tunesmith.run.halving import require_optuna
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.run.spaces import Choice, Counter, Setting, Wanted, choose
from tunesmith.run.trials import Trial

if TYPE_CHECKING:
    from rich.console import RenderableType


GENERAL = "wiki-demo:test"
HALVINGS = 2


@dataclass(frozen=True)
class Order:
    """What somebody asks of a sweep; each field is one of the command's options.

    Attributes:
        wanted: which settings.
        seeds: runs of each, from `train.seed` on.
        out: folder; None is the configuration's.
        forgetting: general text; None for none, `auto` for wiki-demo where the model writes.
        minutes: after so many the trial in progress is saved, and the rest waits for the next time.
        halving: short runs choose which settings get full ones.
        lrs: learning rates by kind of method, instead of the usual multiples of the configuration's.
    """

    wanted: Wanted
    seeds: int = 3
    out: str | None = None
    forgetting: str | None = "auto"
    minutes: float | None = None
    halving: bool = False
    lrs: dict[str, float] = field(default_factory=dict)


@dataclass
class Sweep:
    """A sweep whose settings are chosen and planned.

    Attributes:
        config: what all trials share.
        order: what was asked.
        choice: settings, and what was left out.
        plans: plan.json of each setting by name.
        prepared: data and tokenizer, read once.
    """

    config: Config
    order: Order
    choice: Choice
    plans: dict[str, dict[str, Any]]
    prepared: Prepared

    @property
    def folder(self) -> Path:
        return Path(self.order.out or self.config.out)

    @property
    def metric(self) -> str:
        """The score: the first metric of the configuration."""
        return self.config.evaluate.metrics[0]

    @property
    def base(self) -> Trial:
        """The base model, judged once for all."""
        # whatever the configuration's method is, this is the same base
        update = {"out": str(self.folder / "base"), "log": [], "method": Full()}
        config = self.config.model_copy(update=update)
        return Trial("base", self.config.train.seed, config, self.order.forgetting, base=True)

    @property
    def head_parameters(self) -> int:
        """Parameters that a plan has and a method does not: the prediction head."""
        first = next(iter(self.choice.settings), None)
        return self.plans[first.name]["parameters"]["trainable"] - first.parameters if first else 0

    @property
    def rows_per_step(self) -> float:
        """Rows of a step, on average."""
        return self.prepared.totals.rows / max(1, self.prepared.totals.steps)

    @property
    def rungs(self) -> list[int]:
        """Steps of the short runs that choose who gets full ones, the fewest first; none without halving."""
        full = self.config.train.steps if self.order.halving else None
        return [max(1, full // 2**rung) for rung in range(HALVINGS, 0, -1)] if full is not None else []

    def trial(self, setting: Setting, seed: int, steps: int | None = None) -> Trial:
        """One run of a setting; with `steps`, a shorter one."""
        train = self.config.train
        name = f"{setting.name}-s{seed}" + (f"-{steps}steps" if steps else "")
        update = {"seed": seed, "lr": self.lr(setting), **({"steps": steps} if steps else {})}
        config = self.config.model_copy(
            update={
                "method": setting.method,
                "train": train.model_copy(update=update),
                "log": [],
                "out": str(self.folder / "trials" / name),
            }
        )
        return Trial(setting.name, seed, config, self.order.forgetting, timed=seed == train.seed and not steps)

    def trials(self, settings: Iterable[Setting] | None = None) -> list[Trial]:
        """All runs, one seed after the other, so that a partial table has every method."""
        chosen = list(self.choice.settings if settings is None else settings)
        first = self.config.train.seed
        return [self.trial(one, seed) for seed in range(first, first + self.order.seeds) for one in chosen]

    def as_dict(self) -> dict[str, Any]:
        """What would be run, for `--dry-run --json`."""
        return {
            "settings": [
                {"name": one.name, "why": one.why, "parameters": one.parameters, "lr": self.lr(one), "note": one.note}
                | {"method": one.method.model_dump(mode="json"), "plan": self.plans[one.name]}
                for one in self.choice.settings
            ],
            "left_out": self.choice.left_out,
            "trials": len(self.trials()),
        }

    def lr(self, setting: Setting) -> float:
        """The learning rate of a setting."""
        own = self.order.lrs.get(setting.method.kind)
        return own if own is not None else float(f"{self.config.train.lr * setting.lr_factor:.6g}")


def plan_sweep(config: Config, order: Order) -> Sweep:
    """Chooses and plans what is to be tried. Raises ConfigError, DataError, ModelError."""
    from tunesmith.run.measuring import general_rows
    from tunesmith.run.planning import open_meta

    _check(config, order)
    prepared = prepare(config)
    if order.forgetting == "auto":
        order = replace(order, forgetting=GENERAL if _writes(prepared) else None)
    if order.forgetting is not None:
        general_rows(order.forgetting, prepared.codec)  # what is wrong with it is told before anything runs
    choice = choose(order.wanted, Counter(lambda: open_meta(prepared)))
    sweep = Sweep(config, order, choice, {}, prepared)
    sweep.base.check()
    for setting in list(choice.settings):
        trial = sweep.trial(setting, config.train.seed)
        build_config(as_dict(trial.config), setting.name)  # a learning rate may be out of bounds
        trial.check()
        try:
            sweep.plans[setting.name] = _plan(trial, prepared)
        except (ConfigError, ModelError) as error:
            choice.settings.remove(setting)
            choice.left_out[setting.name] = error.message
    if not choice.settings:
        told = "; ".join(f"{name}: {reason}" for name, reason in choice.left_out.items())
        raise ConfigError(f"nothing fits: {told}", where="--budget", hint="another budget, or a larger --within")
    return sweep


def _plan(trial: Trial, prepared: Prepared) -> dict[str, Any]:
    """plan.json of a trial: its own where it has begun, else made now."""
    from tunesmith.run.planning import plan_run

    path = trial.folder / "plan.json"
    if path.exists():
        return dict(read_json(path, CheckpointError))
    return plan_run(replace(prepared, config=trial.config)).as_dict()


def _writes(prepared: Prepared) -> bool:
    """Whether the model has a loss on running text that it could forget."""
    return family_of(read_json(prepared.folder / "config.json", ModelError)).kind == "decoder"


def _check(config: Config, order: Order) -> None:
    if not config.evaluate.metrics:
        hint = "evaluate.metrics: [accuracy] and data.eval say what is better"
        raise ConfigError("a sweep needs a score: there is no metric", where="evaluate.metrics", hint=hint)
    if order.halving:
        require_optuna()
        if config.train.steps is None:
            raise ConfigError("halving shortens runs by their steps", where="train.steps", hint="set steps, not epochs")
    for kind in order.lrs:
        if kind not in order.wanted.kinds:
            raise ConfigError(f"{kind!r} is not tried, so its rate has no effect", where="--lr")


def plan_table(sweep: Sweep) -> RenderableType:
    """What would be run, for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("method", no_wrap=True)
    for name in ("parameters", "trained", "learning rate", "memory", "training"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for one in sweep.choice.settings:
        plan = sweep.plans[one.name]
        share = f"{100 * one.parameters / plan['parameters']['total']:.3g} %"
        memory, seconds = in_bytes(plan["memory"]["peak_bytes"]), in_time(plan["seconds"] or 0)
        note = one.note or {"budget": "", "ranks": "a cell of the table of ranks"}.get(one.why, one.why)
        table.add_row(one.name, f"{one.parameters:,}", share, f"{sweep.lr(one):.3g}", memory, seconds, note)
    lines = [f"{name}: left out, {reason}" for name, reason in sweep.choice.left_out.items()]
    lines.append(_total(sweep))
    return Group(table, Text("\n".join(lines)))


def _total(sweep: Sweep) -> str:
    """How many runs of how many steps, and for how long."""
    steps, settings, seeds = sweep.prepared.totals.steps, len(sweep.choice.settings), sweep.order.seeds
    short = [(settings // 2**rung, few) for rung, few in enumerate(sweep.rungs) if settings // 2**rung > 1]
    kept = settings // 2 ** len(short)
    told = (
        f"{kept * seeds} trials ({kept} settings x {seeds} seeds) of {steps:,} steps of {sweep.rows_per_step:.3g} rows"
    )
    if short:
        told = f"{' and '.join(f'{count} short runs of {few:,} steps' for count, few in short)}, then {told}"
    runs = kept * seeds + sum(count * few / steps for count, few in short)
    seconds = runs * sum(plan["seconds"] or 0 for plan in sweep.plans.values()) / settings
    return f"{told}, about {in_time(seconds)} of training, judging not counted"
