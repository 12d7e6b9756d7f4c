"""What the processes of a launch do in the tests of layouts: `python several.py FOLDER`, with torchrun's environment.

Many laws share a launch, because starting torch takes longer than all of them. Each leaves files in FOLDER, which the
tests read; what one process must find is computed by the same functions in `alone`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from conformance import CASES, IN_PLACE, built
from safetensors.torch import save_file
from tiny_models import VOCABULARY, disturb, tiny_loaded
from warm import Warm

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.core import moments
from tunesmith.core.errors import ConfigError, DivergedError, Stopped
from tunesmith.core.problem import Problem
from tunesmith.core.rng import torch_generator
from tunesmith.core.switches import SAVINGS, without
from tunesmith.data.batch import to_batch
from tunesmith.data.deal import dealt
from tunesmith.data.encode import Example
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Cursor, Sizes, StepStream
from tunesmith.models.policy import Policy
from tunesmith.objectives.dpo import DPO
from tunesmith.objectives.reward import Reward
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Layout, LayoutSection, layout_of
from tunesmith.parallel.world import ALONE, Alone, joined
from tunesmith.train import spill
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.step import accumulate, fill_missing
from tunesmith.train.trainer import train

OFFLOADS = (("none", "optimizer"), ("none", "activations"), ("zero2", "activations"))
SHARDS = ("none", "zero1", "zero2", "zero3")
METHODS = {
    "full": Full(),
    "lora": LoRA(rank=4, targets=("q", "v", "down")),
}
COMPARING = {"dpo": DPO(), "reward": Reward()}  # objectives, with lora
SIZES = Sizes(rows_per_step=5, micro_batch_rows=2)
STEPS = 10
FEW = 256  # numbers of a tensor from which on int8 moments are codes, here


def examples(count: int = 23) -> list[Example]:
    """Rows of 3 to 30 tokens, of which one to all but the first are supervised."""
    found = []
    for index in range(count):
        draw = torch_generator(0, "rows", index)
        length = int(torch.randint(3, 31, (1,), generator=draw))
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        first = int(torch.randint(1, length, (1,), generator=draw))
        found.append(Example(ids, [place >= first for place in range(length)], f"rows:{index}"))
    return found


def pairs() -> list[Example]:
    """Rows of two answers, the first of which is better."""
    one, other = examples(), examples()[::-1]
    return [
        replace(
            better,
            ids=better.ids + worse.ids,
            supervised=better.supervised + worse.supervised,
            lengths=(len(better.ids), len(worse.ids)),
            ranks=(0, 1),
        )
        for better, worse in zip(one, other, strict=True)
    ]


def steps(
    world: Alone, sizes: Sizes = SIZES, epochs: int | None = None, of: Callable[[], list[Example]] = examples
) -> Any:
    """Steps from a cursor on, as a process gets them."""
    rows = of()

    def stream(cursor: Cursor) -> Iterator[Any]:
        mixture = Mixture([len(rows)], seed=3)
        found = iter(StepStream(mixture, lambda source, row: rows[row], sizes, start=cursor, epochs=epochs))
        return found if world is ALONE else dealt(found, sizes, world.rank, world.size)

    return stream


def ends(epoch: Iterator[Any]) -> list[tuple[int, Any]]:
    """Of the steps of an epoch the first, and the last of three rows only: of four processes one has none."""
    numbered = list(enumerate(epoch))
    return [numbered[0], numbered[-1]]


def made(method: str, layout: Layout, dtype: torch.dtype = torch.float32, recompute: str = "none") -> Any:
    """A tiny llama with tied embeddings and a method on it, as a layout computes with it."""
    loaded = tiny_loaded("llama", dtype=dtype, tie_word_embeddings=True)
    adapter = METHODS[method].attach(loaded, seed=1)
    policy = Policy(loaded, adapter.route, recompute=recompute)
    return layout.adopt(SimpleNamespace(parameters=adapter.parameters, policy=policy))


def gradients(world: Alone, shard: str, method: str) -> dict[str, torch.Tensor]:
    """The gradient of the first steps, each by itself, whole on the first process."""
    layout = layout_of(LayoutSection(data=world.size, shard=shard if world.size > 1 else "none"), world)
    tuned = made(method, layout)
    precision = Precision(tuned.parameters, PrecisionSection(compute="fp32"))
    pieces = layout.hold(precision)
    found = {}
    for number, step in ends(steps(world, epochs=1)(Cursor())):
        batches = [to_batch(rows) for rows in step.micro_batches]
        spare = to_batch(step.spare) if step.spare else None
        loss = accumulate(SFT(), tuned.policy, batches, precision, layout, spare=spare)
        layout.reduce(sorted(pieces))
        whole = layout.whole({name: piece.grad for name, piece in pieces.items()})
        found |= {f"{number}/{name}": value.clone() for name, value in whole.items()}
        found[f"{number}/loss"] = torch.tensor(loss, dtype=torch.float64)
        precision.clear()
        layout.clear()
    return found


def trained(world: Alone, shard: str, method: str, folder: Path, **rest: Any) -> Any:
    """A run of the trainer."""
    layout = layout_of(LayoutSection(data=world.size, shard=shard if world.size > 1 else "none"), world)
    tuned = made(method, layout, rest.pop("dtype", torch.float32), rest.pop("recompute", "none"))
    given = {"steps": STEPS, "rows_per_step": 5, "micro_batch_rows": 2, "lr": 1e-3, "save_every": 5}
    given |= {name: rest.pop(name) for name in ("offload", "optimizer_state") if name in rest}
    settings = TrainSection(**given, weight_decay=0.1)
    precision = PrecisionSection(**rest.pop("precision", {"compute": "fp32"}))
    stream, objective = rest.pop("stream", steps(world)), rest.pop("objective", SFT())
    return train(
        tuned, stream, objective, settings, precision, folder,
        total_steps=STEPS, layout=layout, collate=to_batch, **rest,
    )  # fmt: skip


def launch(folder: Path, size: int, *words: str, script: str = __file__) -> list[Warm]:
    """Starts processes as torchrun would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        Warm(script, str(folder), *words, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


class Poisoned(SFT):
    """An objective that finds no number for one row."""

    kind: Literal["sft"] = "sft"
    row: str

    def loss(self, policy: Any, batch: Any) -> Any:
        found = super().loss(policy, batch)
        return replace(found, total=found.total * math.nan) if self.row in batch.rows else found


def gradients_of_all(world: Alone, folder: Path) -> None:
    """Gradients of whole steps and a run for every layout and method."""
    for shard in SHARDS:
        for method in METHODS:
            found = gradients(world, shard, method)
            if world.is_first:
                save_file(found, folder / f"gradients-{shard}-{method}.safetensors")
            result = trained(world, shard, method, folder / f"run-{shard}-{method}")
            if world.is_first:
                (folder / f"ranks-{shard}-{method}.json").write_text(json.dumps(result.ranks))


def cases(world: Alone, folder: Path) -> None:
    """The gradient of one step for every method there is, and for objectives that compare: how far it is from that of
    one process, or why not."""
    found = {}
    for case in (*CASES, *COMPARING):
        with without(*SAVINGS):
            alone = gradient_of_case(ALONE, "none", case) if world.is_first else {}
            for shard in SHARDS:
                try:
                    told = distance(gradient_of_case(world, shard, case), alone, world)
                except ConfigError as error:
                    told = str(error)
                found[f"{case}, {shard}"] = told
    if world.is_first:
        (folder / "cases.json").write_text(json.dumps(found))


def gradient_of_case(world: Alone, shard: str, case: str) -> dict[str, torch.Tensor]:
    """The gradient of the first step."""
    layout = layout_of(LayoutSection(data=world.size, shard=shard if world.size > 1 else "none"), world)
    loaded = tiny_loaded("llama", tie_word_embeddings=True)
    objective = COMPARING.get(case, SFT())
    loaded.predicts = Problem("reward") if objective.predicts else None
    adapter = (METHODS["lora"] if case in COMPARING else built(case)).attach(loaded, seed=1)
    if case not in IN_PLACE:
        disturb(adapter)
    policy = Policy(loaded, adapter.route)
    tuned = layout.adopt(SimpleNamespace(parameters=adapter.parameters, policy=policy, phases=adapter.phases))
    precision = Precision(tuned.parameters, PrecisionSection(compute="fp32"))
    pieces = layout.hold(precision)
    step = next(iter(steps(world, of=pairs if case in COMPARING else examples)(Cursor())))
    spare = to_batch(step.spare) if step.spare else None
    batches = [to_batch(rows) for rows in step.micro_batches]
    accumulate(objective, tuned.policy, batches, precision, layout, spare=spare)
    fill_missing(pieces, False, layout.reduce(sorted(pieces)))
    found = layout.whole({name: piece.grad for name, piece in pieces.items()})
    layout.close()
    return {name: value.clone() for name, value in found.items()}


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], world: Alone) -> float:
    """Relative, of all tensors together; 0 where there is nothing to compare with."""
    if not world.is_first:
        return 0.0
    assert set(found) == set(wanted)
    far = torch.cat([(found[name].double() - wanted[name].double()).flatten() for name in wanted]).norm()
    return float(far / torch.cat([value.double().flatten() for value in wanted.values()]).norm())


def stopping(world: Alone, at: int) -> Any:
    """Steps of which one comes with SIGTERM for the last process alone."""

    def stream(cursor: Cursor) -> Iterator[Any]:
        for number, step in enumerate(steps(world)(cursor), 1):
            if number == at and world.rank == world.size - 1:
                signal.raise_signal(signal.SIGTERM)
            yield step

    return stream


def others(world: Alone, folder: Path) -> None:
    """What may happen in a run: bf16, recomputation, offload, a broken run, a row without a number, refusal."""
    low = {"dtype": torch.bfloat16, "precision": {"compute": "bf16"}}
    for shard in SHARDS:
        trained(world, shard, "full", folder / f"bf16-{shard}", **low)
        trained(world, shard, "lora", folder / f"again-{shard}", recompute="full")
    spill.LEAST_BYTES, moments.SMALL = 64, FEW  # the model is tiny
    for shard in SHARDS:
        trained(world, shard, "full", folder / f"int8-{shard}", optimizer_state="int8")
    for shard, offload in OFFLOADS:
        trained(world, shard, "full", folder / f"{offload}-{shard}", offload=offload, **low)
    for shard, state in (("zero2", "fp32"), ("zero3", "int8")):
        kept = {"optimizer_state": state}
        with suppress(Stopped):
            trained(world, shard, "full", folder / f"broken-{shard}", stream=stopping(world, at=7), **kept)
        trained(world, shard, "full", folder / f"broken-{shard}", resume=True, **kept)
        trained(world, shard, "full", folder / f"unbroken-{shard}", **kept)
    found = {}
    for shard in SHARDS:
        try:
            trained(world, shard, "lora", folder / f"nan-{shard}", objective=Poisoned(row="rows:7"))
        except DivergedError as error:
            found[shard] = error.message
    (folder / f"nan-{world.rank}.json").write_text(json.dumps(found))


LAWS = {"gradients": gradients_of_all, "cases": cases, "others": others}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) as world:
        for law in sys.argv[2:]:
            LAWS[law](world, folder)


if __name__ == "__main__":
    main()
