"""One side of `sft.py`: tunesmith's own trainer, policy and LoRA on the steps in a file.

`ours.py prepare SETTINGS` writes these steps: rows that tunesmith's data layer has made into tokens, and fresh
factors, so that both sides start from the same numbers. `ours.py train SETTINGS` trains, a block at a time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Measured, Turns, peak_bytes


@dataclass
class Tuned:
    """What the trainer takes: what is trained and the model that it is trained in."""

    parameters: dict[str, Any]
    policy: Any


def main(command: str, path: str) -> None:
    """Runs one of the two commands."""
    settings = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(settings["threads"])
    (prepare if command == "prepare" else train)(settings)


def prepare(settings: dict[str, Any]) -> None:
    """Writes steps.json, init.safetensors and answers what theirs needs to know."""
    from safetensors.torch import save_file

    from tunesmith.models.load import load

    folder = Path(settings["folder"])
    loaded = load(settings["model"])
    adapter = method(settings).attach(loaded, seed=0)
    places = {port.path: insert for port, _, insert in adapter.inserts()}
    save_file({place: insert["A"].detach() for place, insert in places.items()}, folder / "init.safetensors")
    steps = make_steps(settings, loaded.folder)
    (folder / "steps.json").write_text(json.dumps(steps))
    trainable = sum(parameter.numel() for parameter in adapter.parameters.values())
    told = {"model_folder": str(loaded.folder), "places": list(places), "steps": len(steps), "trainable": trainable}
    (folder / "prepared.json").write_text(json.dumps(told))


def make_steps(settings: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of every update, in the run's order: token ids and which of them are supervised."""
    from tunesmith.data.codec import Codec
    from tunesmith.data.dataset import open_data
    from tunesmith.data.order import Mixture
    from tunesmith.data.pack import Sizes, StepStream
    from tunesmith.data.section import DataSection

    section = DataSection(train=settings["data"], max_length=settings["max_length"])
    data = open_data(section.train, section, Codec.open(folder))
    stream = StepStream(Mixture(data.sizes, data.weights), data.example, Sizes(rows_per_step=settings["rows"]))
    return [
        [{"ids": list(row.ids), "supervised": list(row.supervised)} for row in step.micro_batches[0]]
        for step in islice(stream, settings["steps"])
    ]


def method(settings: dict[str, Any]) -> Any:
    """LoRA as both sides have it."""
    from tunesmith.adapt.lora import LoRA

    return LoRA(rank=settings["rank"], alpha=2.0 * settings["rank"], targets=tuple(settings["targets"]))


def train(settings: dict[str, Any]) -> None:
    """Trains on the steps that are named, in turns with the other side."""
    turns = Turns()
    from tunesmith.models.load import load
    from tunesmith.models.policy import Policy
    from tunesmith.objectives.sft import SFT
    from tunesmith.train.section import PrecisionSection, TrainSection
    from tunesmith.train.trainer import train as tunesmith_train

    imported = peak_bytes()
    compute = "fp32" if settings["variant"] == "fp32" else "bf16"
    loaded = load(settings["model_folder"], dtype=compute)
    adapter = method(settings).attach(loaded, seed=0)
    tuned = Tuned(adapter.parameters, Policy(loaded, adapter.route))
    loaded_bytes = peak_bytes()
    steps = list(read_steps(settings))
    section = TrainSection(
        steps=len(steps), rows_per_step=settings["rows"], lr=settings["lr"],
        schedule="constant", warmup=0.0, save_every=10**6, clip=1.0,
    )  # fmt: skip

    def observe(record: dict[str, Any]) -> None:
        turns.step(Measured(record["loss"], record["supervised_tokens"]), record["step"] == len(steps))

    turns.tell(imports_bytes=imported, loaded_bytes=loaded_bytes, what=f"weights {loaded.model.dtype}")
    turns.begin()
    with tempfile.TemporaryDirectory() as run:
        tunesmith_train(
            tuned, lambda cursor: iter(steps), SFT(), section, PrecisionSection(compute=compute), Path(run),
            total_steps=len(steps), observers=[observe],
        )  # fmt: skip


def read_steps(settings: dict[str, Any]) -> Iterator[Any]:
    """The steps as the trainer takes them."""
    from tunesmith.data.encode import Example
    from tunesmith.data.pack import Cursor, Step

    kept = json.loads((Path(settings["folder"]) / "steps.json").read_text())
    for number, index in enumerate(settings["use"], 1):
        rows = [Example(row["ids"], row["supervised"], f"row:{index}.{n}") for n, row in enumerate(kept[index])]
        yield Step(number, cut(rows, settings["micro_tokens"]), Cursor(0, number), 0.0)


def cut(rows: list[Any], most_tokens: int) -> list[list[Any]]:
    """Rows of a step as micro-batches of at most so many tokens, at least one row."""
    found: list[list[Any]] = [[]]
    for row in rows:
        if found[-1] and sum(len(one.ids) for one in found[-1]) + len(row.ids) > most_tokens:
            found.append([])
        found[-1].append(row)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
