"""What the processes of a launch do in the tests of pipelines and tensor parallelism: `python in_parts.py FOLDER`.

As in `several.py`, many laws share a launch; each layout leaves its files in FOLDER, and `gradients` in one process
says what they must hold.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from several import METHODS, steps
from tiny_models import tiny_loaded

from tunesmith.adapt.lora import LoRA
from tunesmith.data.batch import to_batch
from tunesmith.data.pack import Cursor
from tunesmith.evaluate.losses import row_losses
from tunesmith.models.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Layout, LayoutSection, layout_of
from tunesmith.parallel.world import ALONE, Alone, joined
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.step import accumulate
from tunesmith.train.trainer import train

LAYOUTS = {
    2: {
        "gpipe": LayoutSection(pipeline=2, schedule="gpipe"),
        "1f1b": LayoutSection(pipeline=2, schedule="1f1b"),
        "interleaved": LayoutSection(pipeline=2, schedule="interleaved"),
    },
    4: {
        "pipeline-4": LayoutSection(pipeline=4),
        "data-2-pipeline-2": LayoutSection(data=2, pipeline=2, shard="zero1"),
    },
}
STEPS = 4


def made(method: str, layout: Layout, family: str = "llama") -> Any:
    """A tiny model of four blocks with tied embeddings and a method on it, as a layout computes with it."""
    loaded = tiny_loaded(family, num_hidden_layers=4, tie_word_embeddings=True)
    found = METHODS[method] if method in METHODS else LoRA(rank=4, targets=(method,))
    adapter = found.attach(loaded, seed=1)
    if method != "full":
        with torch.no_grad():  # a B of zeros leaves A without a gradient
            for number, parameter in enumerate(adapter.parameters.values()):
                draw = torch.Generator().manual_seed(number)
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return layout.adopt(SimpleNamespace(parameters=adapter.parameters, policy=Policy(loaded, adapter.route)))


def gradients(world: Alone, section: LayoutSection, method: str, family: str = "llama") -> dict[str, torch.Tensor]:
    """The gradient of the first steps, each by itself, and losses of rows, whole on the first process."""
    layout = layout_of(section, world)
    tuned = made(method, layout, family)
    precision = Precision(tuned.parameters, PrecisionSection(compute="fp32"))
    pieces = layout.hold(precision)
    found = {}
    for number, step in enumerate(steps(layout.data, epochs=1)(Cursor())):
        batches = [to_batch(rows) for rows in step.micro_batches]
        loss = accumulate(SFT(), tuned.policy, batches, precision, layout)
        layout.reduce(sorted(pieces))
        norm = layout.norm([piece.grad for piece in pieces.values() if piece.grad is not None])
        whole = layout.whole({name: piece.grad for name, piece in pieces.items()})
        found |= {f"{number}/{name}": value.clone() for name, value in whole.items()}
        found |= {f"{number}/loss": torch.tensor(loss, dtype=torch.float64), f"{number}/norm": norm.double()}
        precision.clear()
        layout.clear()
    totals, _ = row_losses(
        tuned.policy, [row for batch in next(iter(steps(ALONE)(Cursor()))).micro_batches for row in batch]
    )
    found["rows"] = torch.tensor(totals, dtype=torch.float64)
    return found


def trained(
    world: Alone, section: LayoutSection, method: str, folder: Path, resume: bool = False, count: int = STEPS
) -> Any:
    """A run of the trainer."""
    layout = layout_of(section, world)
    settings = TrainSection(steps=STEPS, rows_per_step=5, micro_batch_rows=2, lr=1e-3, save_every=2, weight_decay=0.1)
    return train(
        made(method, layout), steps(layout.data), SFT(), settings, PrecisionSection(compute="fp32"), folder,
        total_steps=count, layout=layout, collate=to_batch, resume=resume,
    )  # fmt: skip


def main() -> None:
    folder, size = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    with joined(int(os.environ["RANK"]), size) as world:
        for name, section in LAYOUTS[size].items():
            for method in METHODS:
                found = gradients(world, section, method)
                result = trained(world, section, method, folder / f"run-{name}-{method}")
                if world.is_first:
                    save_file(found, folder / f"gradients-{name}-{method}.safetensors")
                    (folder / f"ranks-{name}-{method}.json").write_text(json.dumps(result.ranks))


if __name__ == "__main__":
    main()
