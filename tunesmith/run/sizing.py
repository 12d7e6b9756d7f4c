"""The largest model of a family that a run's method, precision and sizes can tune within a memory.

The one idea: a config.json alone, scaled along the family's published sizes, is a model on the meta device; its plan is
traced with rows as long as any may be. No weights and no rows are read, as in `run.placing`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config
from tunesmith.core.amounts import in_bytes
from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import canonical_json, read_json
from tunesmith.core.problem import CLASSES, Problem
from tunesmith.models.source import resolve
from tunesmith.plan.published import PUBLISHED, Rung, rungs, scaled
from tunesmith.run.opening import find
from tunesmith.run.placing import check_placed, work_of

if TYPE_CHECKING:
    from tunesmith.plan.plan import Plan


@dataclass(frozen=True)
class Sized:
    """A size of the family with what tuning it needs."""

    rung: Rung
    parameters: int
    needed_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        shape = self.rung.shape
        sizes = {"blocks": shape.n_layers, "width": shape.d_model, "heads": shape.n_heads, "vocabulary": shape.vocab}
        return {"name": self.rung.name, "parameters": self.parameters, "needed_bytes": self.needed_bytes, **sizes}


@dataclass(frozen=True)
class LargestModel:
    """The answer.

    Attributes:
        room_bytes: what there is.
        family: of the config.
        published: the sizes are those of published models, not of a rule.
        fits: the largest that fits; None where not even the smallest does.
        beyond: the next larger one, which does not; None where all fit.
    """

    room_bytes: int
    family: str
    published: bool
    fits: Sized | None
    beyond: Sized | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "room_bytes": self.room_bytes,
            "family": self.family,
            "published": self.published,
            "fits": self.fits and self.fits.as_dict(),
            "beyond": self.beyond and self.beyond.as_dict(),
        }


def largest_model(config: Config, room: int) -> LargestModel:
    """The largest of a family's sizes that fits into `room` bytes; memory grows with them, so that few are planned.

    Raises ConfigError, ModelError for what cannot be planned from a config alone.
    """
    if config.layout.processes > 1:
        told = "the largest model is looked for in one process"
        raise ConfigError(told, where="layout", hint="leave it out; plan --cluster places one model in every way")
    check_placed(config)
    folder = resolve(find(config.model).model)
    settings = read_json(folder / "config.json", ModelError)
    config.objective.check(settings)
    config.method.check(settings)
    sizes = rungs(settings)
    known: dict[int, Sized] = {}

    def fits(number: int) -> bool:
        if number not in known:
            known[number] = _sized(config, settings, sizes[number])
        return known[number].needed_bytes <= room

    count = _first_that_fails(fits, len(sizes))
    family = str(settings.get("model_type"))
    return LargestModel(room, family, family in PUBLISHED, known.get(count - 1), known.get(count))


def show_largest_model(found: dict[str, Any]) -> list[str]:
    """Lines for people, of `LargestModel.as_dict()`."""
    room, family = in_bytes(found["room_bytes"]), found["family"]
    of = f"the published sizes of {family}" if found["published"] else f"{family}, scaled in depth and width alike"
    fits, beyond = found["fits"], found["beyond"]
    lines = [f"no model fits into {room}, of {of}" if fits is None else f"{_told(fits)} and fits into {room}"]
    if beyond is not None:
        lines.append(f"the next larger does not: {_told(beyond)}" if fits else f"the smallest: {_told(beyond)}")
    return [*lines, f"of {of}; rows as long as data.max_length, all of their tokens learnt"]


def _told(size: dict[str, Any]) -> str:
    needed, billions = in_bytes(size["needed_bytes"]), size["parameters"] / 1e9
    return f"{size['name']} ({billions:.3g} billion parameters) needs {needed}"


def _first_that_fails(fits: Callable[[int], bool], count: int) -> int:
    """How many from the first on fit, asking about the neighbours of the answer and few more."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(middle) else (low, middle)
    return low


def _sized(config: Config, settings: dict[str, Any], rung: Rung) -> Sized:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(canonical_json(scaled(settings, rung.shape)), "utf-8")
        plan = plan_of_config(config, Path(place))
    return Sized(rung, plan.parameters.total, plan.memory.resident_bytes)


def plan_of_config(config: Config, folder: Path) -> Plan:
    """The plan of a run of the model in a folder with config.json, all its rows `data.max_length` long.

    Where recomputation is chosen when a run begins (`auto`), all of it is taken; labels are two.
    """
    import torch
    from torch import Tensor, nn

    from tunesmith.core.types import Batch
    from tunesmith.models.heads import value_head
    from tunesmith.models.load import meta
    from tunesmith.models.policy import Policy
    from tunesmith.plan.foreseen import Met, Seen
    from tunesmith.plan.plan import Workload, make_plan
    from tunesmith.plan.shape import read_shape
    from tunesmith.plan.trace import sample_batch
    from tunesmith.train.offload import Offload
    from tunesmith.train.precision import resolve as precision_of

    train, objective = config.train, config.objective
    loaded = meta(str(folder), dtype=precision_of(config.precision), base=config.precision.base)
    if objective.predicts:
        labels = ("one", "other") if objective.predicts in CLASSES else ()
        loaded.predicts = Problem(objective.predicts, labels, train.seed)
    adapter = config.method.attach(loaded, seed=train.seed)
    again = "full" if train.recompute == "auto" else train.recompute
    policy = Policy(loaded, adapter.route, packed=config.data.packing, recompute=again)
    policy.value = value_head(loaded, train.seed) if objective.has_values else None
    heads = [head for head in (adapter.head, policy.value) if head is not None]
    model = nn.ModuleList([loaded.model, *heads]) if heads else loaded.model
    model.train(config.method.kind != "peft")  # as in `run.planning`
    trained = [*adapter.parameters.values(), *(policy.value.parameters() if policy.value is not None else ())]
    offload = Offload(train.offload, policy, torch.device("cpu"), Path(config.out))

    def loss(batch: Batch) -> Tensor:
        with offload.forward():
            return objective.loss(policy, batch).total

    lengths, answers, more = _micro_batch(config)
    met = (Met(Seen(sample_batch(lengths, 1.0, objective.predicts, answers)), has_gradients=more),)
    return make_plan(
        model,
        read_shape(folder),
        Workload(1, sum(lengths), lengths, 1.0, objective.predicts, met=met, answers=answers),
        trainable=trained,
        loss=loss,
        master=config.precision.master,
        optimizer_state=train.optimizer_state,
        offload_optimizer=train.offload == "optimizer",
    )


def _micro_batch(config: Config) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Lengths of its documents, how many of them each row has where answers are compared, and whether a step has more
    than one."""
    train, work = config.train, work_of(config)
    rows = train.micro_batch_rows or max(1, (train.micro_batch_tokens or work.row_tokens) // work.row_tokens)
    each = 2 if config.objective.compares in ("pairs", "rankings") else 1
    if train.micro_batch_tokens:
        rows = max(1, rows // each)  # a row's tokens are those of its answers
    more = work.rows > rows * each if train.micro_batch_tokens else work.rows > rows
    return (work.row_tokens,) * (rows * each), (each,) * rows if each > 1 else (), more
