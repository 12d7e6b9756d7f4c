"""What the processes of a launch do in the tests of layouts: `python several.py FOLDER`, with torchrun's environment.

Many laws share a launch, because starting torch takes longer than all of them. Each leaves files in FOLDER, which the
tests read; what one process must find is computed by the same functions in `alone`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import VOCABULARY, tiny_loaded

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.core.rng import torch_generator
from tunesmith.data.batch import to_batch
from tunesmith.data.deal import dealt
from tunesmith.data.encode import Example
from tunesmith.data.order import Mixture
from tunesmith.data.pack import Cursor, Sizes, StepStream
from tunesmith.models.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Layout, LayoutSection, layout_of
from tunesmith.parallel.world import ALONE, Alone, joined
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.step import accumulate
from tunesmith.train.trainer import train

SHARDS = ("none", "zero1", "zero2", "zero3")
METHODS = {
    "full": Full(),
    "lora": LoRA(rank=4, targets=("q", "v", "down")),
}
SIZES = Sizes(rows_per_step=5, micro_batch_rows=2)
STEPS = 20


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


def steps(world: Alone, sizes: Sizes = SIZES, epochs: int | None = None) -> Any:
    """Steps from a cursor on, as a process gets them."""
    rows = examples()

    def stream(cursor: Cursor) -> Iterator[Any]:
        mixture = Mixture([len(rows)], seed=3)
        found = iter(StepStream(mixture, lambda source, row: rows[row], sizes, start=cursor, epochs=epochs))
        return found if world is ALONE else dealt(found, sizes, world.rank, world.size)

    return stream


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
    # the last step of the epoch has three rows only: with four processes one has none
    for number, step in enumerate(steps(world, epochs=1)(Cursor())):
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
    settings = TrainSection(
        **{"steps": STEPS, "rows_per_step": 5, "micro_batch_rows": 2, "lr": 1e-3, "save_every": 10, "weight_decay": 0.1}
        | rest.pop("settings", {})
    )
    return train(
        tuned, steps(world), SFT(), settings, PrecisionSection(**rest.pop("precision", {"compute": "fp32"})), folder,
        total_steps=settings.steps, layout=layout, collate=to_batch, **rest,
    )  # fmt: skip


def launch(folder: Path, size: int, *words: str, script: str = __file__) -> list[subprocess.Popen[str]]:
    """Starts processes as torchrun would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, script, str(folder), *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) as world:
        for shard in SHARDS:
            for method in METHODS:
                found = gradients(world, shard, method)
                if world.is_first:
                    save_file(found, folder / f"gradients-{shard}-{method}.safetensors")
                result = trained(world, shard, method, folder / f"run-{shard}-{method}")
                if world.is_first:
                    (folder / f"ranks-{shard}-{method}.json").write_text(json.dumps(result.ranks))


if __name__ == "__main__":
    main()
