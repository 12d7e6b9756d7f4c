"""tunesmith's side of benchmarks: its own trainer, policy and methods on the steps in a file.

`ours.py prepare SETTINGS` writes these steps (`rows.py`) and, for LoRA, fresh factors, so that both sides start from
the same numbers. `ours.py train SETTINGS` trains, a block at a time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import make_steps
from benchmarks.turns import Measured, Turns, ceiling, counting, peak_bytes


@dataclass
class Tuned:
    """What the trainer takes: what is trained and the model that it is trained in."""

    parameters: dict[str, Any]
    policy: Any


@dataclass
class InOrder:
    """Rows one after another, as a mixture."""

    count: int

    def __len__(self) -> int:
        return self.count

    def pick(self, epoch: int, position: int) -> tuple[int, int]:
        return 0, position


def main(command: str, path: str) -> None:
    """Runs one of the two commands."""
    settings = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(settings["threads"])
    (prepare if command == "prepare" else train)(settings)


def prepare(settings: dict[str, Any]) -> None:
    """Writes steps.json, init-SEED.safetensors and answers what theirs needs to know."""
    from safetensors.torch import save_file

    from tunesmith.models.load import load

    folder = Path(settings["folder"])
    loaded = load(settings["model"])
    places: list[str] = []
    trainable = 0
    for seed in settings.get("seeds", [0]):
        adapter = attached(settings | {"seed": seed}, loaded)
        trainable = sum(parameter.numel() for parameter in adapter.parameters.values())
        if settings["method"]["kind"] == "lora":
            inserts = {port.path: insert for port, _, insert in adapter.inserts()}
            places = list(inserts)
            factors = {place: insert["A"].detach() for place, insert in inserts.items()}
            save_file(factors, folder / f"init-{seed}.safetensors")
            adapter.detach()
    steps = make_steps(settings | {"seed": 0}, loaded.folder)
    (folder / "steps.json").write_text(json.dumps(steps))
    told = {"model_folder": str(loaded.folder), "places": places, "steps": len(steps), "trainable": trainable}
    (folder / "prepared.json").write_text(json.dumps(told))


def attached(settings: dict[str, Any], loaded: Any) -> Any:
    """The method of the settings on a model."""
    from tunesmith.adapt.methods import METHODS

    return METHODS.load(settings["method"]["kind"])(**settings["method"]).attach(loaded, seed=settings.get("seed", 0))


def train(settings: dict[str, Any]) -> None:
    """Trains on the steps that are named, in turns with the other side."""
    compute = settings["variant"]
    turns = Turns(lambda: ceiling(settings["precision"]))
    from tunesmith.models.load import load
    from tunesmith.models.policy import Policy
    from tunesmith.objectives.sft import SFT
    from tunesmith.train.section import PrecisionSection, TrainSection
    from tunesmith.train.trainer import train as tunesmith_train

    imported = peak_bytes()
    loaded = load(settings["model_folder"], dtype=compute)
    adapter = attached(settings, loaded)
    tuned = Tuned(adapter.parameters, Policy(loaded, adapter.route))
    loaded_bytes = peak_bytes()
    steps = list(read_steps(settings))
    section = TrainSection(
        steps=len(steps), rows_per_step=settings["rows"], lr=settings["lr"],
        schedule="constant", warmup=0.0, save_every=10**6, clip=1.0,
    )  # fmt: skip

    def observe(record: dict[str, Any]) -> None:
        turns.step(Measured(record["loss"], record["supervised_tokens"]), record["step"] == len(steps))

    trained = sum(parameter.numel() for parameter in adapter.parameters.values())
    what = f"weights {loaded.model.dtype}, {trained} numbers train"
    turns.tell(imports_bytes=imported, loaded_bytes=loaded_bytes, what=what, trained=trained)
    turns.begin()
    with tempfile.TemporaryDirectory() as run, counting(turns, loaded.model, settings.get("count", False)):
        tunesmith_train(
            tuned, lambda cursor: iter(steps), SFT(), section, PrecisionSection(compute=compute), Path(run),
            total_steps=len(steps), observers=[observe],
        )  # fmt: skip


def read_steps(settings: dict[str, Any]) -> Iterator[Any]:
    """The steps as the trainer takes them, cut into micro-batches as tunesmith's data layer cuts them."""
    from tunesmith.data.encode import Example

    kept = json.loads((Path(settings["folder"]) / "steps.json").read_text())
    for number, index in enumerate(settings["use"], 1):
        rows = [Example(row["ids"], row["supervised"], f"row:{index}.{n}") for n, row in enumerate(kept[index])]
        yield cut(rows, number, settings["micro_tokens"])


def cut(rows: list[Any], number: int, micro_tokens: int) -> Any:
    """One step of these rows."""
    from dataclasses import replace

    from tunesmith.data.pack import Cursor, Sizes, StepStream

    sizes = Sizes(tokens_per_step=sum(len(row.ids) for row in rows), micro_batch_tokens=micro_tokens)
    stream: Any = StepStream(InOrder(len(rows)), lambda source, row: rows[row], sizes, epochs=1)  # type: ignore[arg-type]
    return replace(next(iter(stream)), number=number, cursor=Cursor(0, number), epoch=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
