"""What the processes of a launch do in the tests of pipelines and tensor parallelism: `python in_parts.py FOLDER`.

As in `several.py`, many laws share a launch; each layout leaves its files in FOLDER, and `gradients` in one process
says what they must hold.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from conformance import CASES as OF_METHODS
from conformance import IN_PLACE, built
from safetensors.torch import save_file
from several import METHODS, ends, examples, steps
from tiny_models import tiny_loaded, with_exact_norms

from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError
from tunesmith.core.problem import Problem
from tunesmith.core.switches import SAVINGS, without
from tunesmith.data.batch import to_batch
from tunesmith.data.encode import Example
from tunesmith.data.pack import Cursor
from tunesmith.evaluate.losses import row_losses
from tunesmith.evaluate.predictions import predict
from tunesmith.models.policy import Policy
from tunesmith.models.quantize import hold_as_codes, quantisable
from tunesmith.models.recompute import How
from tunesmith.objectives.predict import Predict
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Layout, LayoutSection, layout_of
from tunesmith.parallel.world import ALONE, Alone, joined
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.step import accumulate
from tunesmith.train.trainer import train


@dataclass(frozen=True)
class Case:
    """A layout and what is computed in it.

    Attributes:
        exact: activations in float64, so that what is not rounding shows: a sum over parts has another order.
        recompute: as `Policy` has it.
        problem: what is predicted; None writes text.
        low: the model's numbers are bfloat16's, and so are activations where they are not exact.
        base: as `precision` has it.
        plain: blocks run as transformers has them, here and in one process, as those that zero3 gathers do.
    """

    section: LayoutSection
    family: str = "llama"
    exact: bool = False
    recompute: How = "none"
    problem: Problem | None = None
    low: bool = False
    base: Literal["same", "int8", "nf4"] = "same"
    plain: bool = False

    @property
    def methods(self) -> list[str]:
        """What is trained: codes are for weights that are frozen."""
        return [method for method in METHODS if method != "full" or self.base == "same"]

    @property
    def objective(self) -> Any:
        return SFT() if self.problem is None else Predict(problem=self.problem.kind)

    def rows(self) -> list[Example]:
        """Those of `several`, with labels where some are to be predicted."""
        if self.problem is None:
            return examples()
        return [replace(row, labels=self._labels(row)) for row in examples()]

    def _labels(self, row: Example) -> tuple[int, ...]:
        places = [place for place, taught in enumerate(row.supervised) if taught]
        assert self.problem is not None
        return tuple(place % 3 for place in places[: None if self.problem.kind == "tokens" else 1])


CASES = {
    2: {
        "gpipe": Case(LayoutSection(pipeline=2, schedule="gpipe")),
        "1f1b": Case(LayoutSection(pipeline=2, schedule="1f1b")),
        "interleaved": Case(LayoutSection(pipeline=2, schedule="interleaved")),
        "made-again": Case(LayoutSection(pipeline=2, schedule="1f1b"), recompute="full"),
        "through-modules": Case(LayoutSection(pipeline=2), "granite"),
        "tensor-2": Case(LayoutSection(tensor=2), exact=True),
        "norms-of-heads": Case(LayoutSection(tensor=2), "qwen3", exact=True),
        "codes": Case(LayoutSection(pipeline=2), base="nf4"),
        "norms-behind": Case(LayoutSection(tensor=2), "gemma2", exact=True),
        "labels": Case(LayoutSection(pipeline=2), exact=True, problem=Problem("classification", ("a", "b", "c"))),
        "words": Case(LayoutSection(tensor=2), exact=True, problem=Problem("tokens", ("a", "b", "c"))),
    },
    4: {
        "pipeline-4": Case(LayoutSection(pipeline=4)),
        "data-2-pipeline-2": Case(LayoutSection(data=2, pipeline=2)),
        "tensor-2-pipeline-2": Case(LayoutSection(tensor=2, pipeline=2), exact=True),
        "data-2-pipeline-2-zero2": Case(LayoutSection(data=2, pipeline=2, shard="zero2")),
        "data-2-tensor-2-zero1": Case(LayoutSection(data=2, tensor=2, shard="zero1"), exact=True),
        "data-2-tensor-2-zero2": Case(LayoutSection(data=2, tensor=2, shard="zero2"), exact=True),
        "data-2-tensor-2-zero3": Case(LayoutSection(data=2, tensor=2, shard="zero3"), exact=True),
        "data-2-pipeline-2-zero3": Case(LayoutSection(data=2, pipeline=2, shard="zero3"), plain=True),
        "interleaved-zero2": Case(LayoutSection(data=2, pipeline=2, shard="zero2", schedule="interleaved")),
    },
}
# whose training is followed, too
TRAINED = (
    *("interleaved", "tensor-2", "tensor-2-pipeline-2", "data-2-tensor-2-zero2", "interleaved-zero2"),
    *("data-2-tensor-2-zero3", "data-2-pipeline-2-zero3"),
)
STEPS = 4
LOW = {"low-pipeline": Case(LayoutSection(pipeline=2), low=True), "low-tensor": Case(LayoutSection(tensor=2), low=True)}
# the table of methods, in both ways to cut a model
CUTS = {"tensor": Case(LayoutSection(tensor=2), exact=True), "pipeline": Case(LayoutSection(pipeline=2))}
TABLE = OF_METHODS | {
    "top_layers 3": ("top_layers", {"layers": 3}),
    "lora maps": ("lora", {"rank": 2, "targets": ("q", "o"), "also_train": ("v", "down")}),
}


def made(method: str, layout: Layout, case: Case) -> Any:
    """A tiny model of four blocks with tied embeddings and a method on it, as a layout computes with it."""
    dtype = torch.bfloat16 if case.low else torch.float64 if case.exact else torch.float32
    # an embedding so large that replicas which share state cut within it, at each end of a pipeline elsewhere
    shape = {"num_hidden_layers": 4, "vocab_size": 701, "tie_word_embeddings": True}
    loaded = tiny_loaded(case.family, dtype=dtype, **shape)
    if case.exact:
        with_exact_norms(loaded).model.to(torch.float64)
    if case.base != "same":
        hold_as_codes(loaded.model, quantisable(loaded.model), case.base, dtype, {})
    loaded.predicts = case.problem
    adapter = (METHODS[method] if method in METHODS else built(method, TABLE)).attach(loaded, seed=1)
    if method not in IN_PLACE:
        with torch.no_grad():  # a B of zeros leaves A without a gradient
            for number, parameter in enumerate(adapter.parameters.values()):
                draw = torch.Generator().manual_seed(number)
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    policy = Policy(loaded, adapter.route, recompute=case.recompute)
    return layout.adopt(SimpleNamespace(parameters=adapter.parameters, policy=policy))


def gradients(world: Alone, case: Case, method: str, count: int | None = None) -> dict[str, torch.Tensor]:
    """The gradient of the first steps, each by itself, and losses of rows, whole on the first process."""
    with without(*SAVINGS) if case.plain else nullcontext():
        return _gradients(world, case, method, count)


def _gradients(world: Alone, case: Case, method: str, count: int | None) -> dict[str, torch.Tensor]:
    layout = layout_of(case.section, world)
    tuned = made(method, layout, case)
    precision = Precision(tuned.parameters, PrecisionSection(compute="fp32"))
    pieces = layout.hold(precision)
    found = {}
    for number, step in ends(steps(layout.data, epochs=1, of=case.rows)(Cursor()))[:count]:
        batches = [to_batch(rows) for rows in step.micro_batches]
        spare = to_batch(step.spare) if layout.in_step and step.spare else None
        loss = accumulate(case.objective, tuned.policy, batches, precision, layout, spare=spare)
        layout.reduce(sorted(pieces))
        norm = layout.norm([piece.grad for piece in pieces.values() if piece.grad is not None])
        whole = layout.whole({name: piece.grad for name, piece in pieces.items()})
        found |= {f"{number}/{name}": value.clone() for name, value in whole.items()}
        found |= {f"{number}/loss": torch.tensor(loss, dtype=torch.float64), f"{number}/norm": norm.double()}
        precision.clear()
        layout.clear()
    first = next(iter(steps(ALONE, of=case.rows)(Cursor())))
    rows = [row for batch in first.micro_batches for row in batch]
    if case.problem is None:
        totals, _ = row_losses(tuned.policy, rows)
    else:
        totals = predict(tuned.policy, rows, case.problem).losses
    found["rows"] = torch.tensor(totals, dtype=torch.float64)
    return found


def trained(world: Alone, case: Case, method: str, folder: Path, count: int = STEPS, resume: bool = False) -> Any:
    """A run of the trainer, and the weights that it ends with."""
    layout = layout_of(case.section, world)
    settings = TrainSection(steps=count, rows_per_step=5, micro_batch_rows=2, lr=1e-3, save_every=2, weight_decay=0.1)
    result = train(
        made(method, layout, case), steps(layout.data), SFT(), settings, PrecisionSection(compute="fp32"), folder,
        total_steps=STEPS, layout=layout, collate=to_batch, resume=resume,
    )  # fmt: skip
    return result, layout.whole(layout.pieces)


def followed(world: Alone, case: Case, method: str, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a run that begins here and ends in another layout: half of the steps here, all of them alone."""
    before = world.told(world.total())
    result, whole = trained(world, case, method, folder)
    sent = [
        {name: count - earlier.get(name, 0) for name, count in rank.items() if name.endswith("_sent_bytes")}
        for rank, earlier in zip(result.ranks, before, strict=True)
    ]
    if world.is_first:
        ranks = [rank | its for rank, its in zip(result.ranks, sent, strict=True)]
        (folder / "ranks.json").write_text(json.dumps(ranks))
    begun, again = (folder.with_name(folder.name + end) for end in ("-begun", "-again"))
    trained(world, case, method, begun, count=STEPS // 2)
    world.first(lambda: shutil.copytree(begun, again) and None)
    _, gone_on = trained(world, case, method, again, resume=True)
    assert all(torch.equal(gone_on[name], value) for name, value in whole.items()), "resumed as it was: the same bits"
    return {name: value.float() for name, value in whole.items()}


def table(world: Alone, folder: Path) -> None:
    """How far each method's first gradient and losses are from those of one process, in both cuts, or why not."""
    found: dict[str, Any] = {}
    for name in TABLE:
        for cut, case in CUTS.items():
            try:
                refused(name, case.section)
                told = gradients(world, case, name, count=1)
            except ConfigError as error:
                found[f"{name}, {cut}"] = str(error)
                continue
            if world.is_first:
                wanted = gradients(ALONE, replace(case, section=LayoutSection()), name, count=1)
                found[f"{name}, {cut}"] = farthest(told, wanted)
    if world.is_first:
        (folder / "table.json").write_text(json.dumps(found))


def farthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The relative distance of the tensor that is farthest; one of nothing but rounding counts as a part of all."""
    assert found.keys() == wanted.keys()
    floor = 1e-3 * float(wanted["0/norm"])
    far = {name: (found[name].double() - value.double()).norm() for name, value in wanted.items()}
    return max(float(far[name] / max(value.double().norm(), floor)) for name, value in wanted.items())


def refused(name: str, section: LayoutSection) -> None:
    """Raises ConfigError as a run would, before anything is loaded."""
    kind, settings = TABLE[name]
    rest = {"model": "m", "data": {"train": "x"}, "train": {"steps": 1}, "out": "o"}
    build_config({**rest, "method": {"kind": kind, **settings}, "layout": section.model_dump()})


def main() -> None:
    folder, size = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    with joined(int(os.environ["RANK"]), size) as world:
        for name, case in {**CASES[size], **(LOW if size == 2 else {})}.items():
            for method in case.methods:
                found = gradients(world, case, method)
                if world.is_first:
                    save_file(found, folder / f"gradients-{name}-{method}.safetensors")
                if name not in TRAINED:
                    continue
                found = followed(world, case, method, folder / f"{name}-{method}")
                if world.is_first:
                    save_file(found, folder / f"weights-{name}-{method}.safetensors")
        if size == 2:
            table(world, folder)


if __name__ == "__main__":
    main()
