"""Something to train in milliseconds: a model of a few hundred numbers, rows of uneven length, a data stream.

The model looks at a token and the one before it in the same document, so that documents are independent and
dropout, a matrix, a norm and a bias are all there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.rng import permute, seed_for
from tunesmith.core.types import Batch
from tunesmith.data.encode import Example as Row
from tunesmith.data.pack import Cursor, Step
from tunesmith.objectives.sft import SFT
from tunesmith.train.section import PrecisionSection, TrainSection
from tunesmith.train.trainer import Result, train

VOCABULARY, WIDTH = 23, 16


def rows(count: int = 24, seed: int = 0) -> list[Row]:
    """Rows of 3 to 12 tokens; the first is never supervised, the others by chance, the last always."""
    made = []
    for index in range(count):
        draw = torch.Generator().manual_seed(seed_for(seed, "rows", index))
        length = int(torch.randint(3, 13, (1,), generator=draw))
        ids = torch.randint(0, VOCABULARY, (length,), generator=draw).tolist()
        chosen = (torch.rand(length, generator=draw) < 0.6).tolist()
        made.append(Row(ids, [False, *chosen[1:-1], True], f"rows.jsonl:{index + 1}"))
    return made


def collate(examples: list[Row]) -> Batch:
    ids, positions, sources = [], [], []
    for row in examples:
        sources += [len(ids) + at - 1 for at, learnt in enumerate(row.supervised) if learnt]
        positions += list(range(len(row.ids)))
        ids += row.ids
    ids_, sources_ = torch.tensor(ids), torch.tensor(sources, dtype=torch.int64)
    lengths = tuple(len(row.ids) for row in examples)
    where = tuple(row.where for row in examples)
    return Batch(ids_, torch.tensor(positions), lengths, sources_, ids_[sources_ + 1], where)


class TinyModel(nn.Module):
    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.up = nn.Linear(2 * WIDTH, 2 * WIDTH)
            self.norm = nn.LayerNorm(2 * WIDTH)
            self.head = nn.Linear(2 * WIDTH, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        now = self.embed(ids)
        before = torch.cat([torch.zeros_like(now[:1]), now[:-1]]) * (positions > 0).unsqueeze(1)
        return self.head(self.norm(self.dropout(torch.tanh(self.up(torch.cat([now, before], dim=1))))))


class TinyPolicy:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def token_losses(self, batch: Batch) -> Tensor:
        logits = self.model(batch.ids, batch.positions)[batch.sources]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return nn.functional.cross_entropy(logits.to(wide), batch.targets, reduction="none")


class TinyTuned:
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        self.policy = TinyPolicy(TinyModel(seed, dropout).to(dtype).eval())
        self.parameters = dict(sorted(self.policy.model.named_parameters()))


def stream(
    data: list[Row], settings: TrainSection, epochs: int = 1000, delay_seconds: float = 0.0
) -> Callable[[Cursor], Iterator[Step]]:
    """`rows_per_step` rows a step in a shuffled order that depends on seed, epoch and position alone."""
    size, micro = settings.rows_per_step, settings.micro_batch_rows
    assert size is not None
    assert micro is not None

    def steps(start: Cursor) -> Iterator[Step]:
        place = start.epoch * len(data) + start.position
        while place < epochs * len(data):
            end = min(place + size, epochs * len(data))
            chosen = [_pick(data, settings.seed, at) for at in range(place, end)]
            cut = [chosen[at : at + micro] for at in range(0, len(chosen), micro)]
            place = end
            time.sleep(delay_seconds)
            yield Step(0, cut, Cursor(*divmod(place, len(data))), place / len(data))

    return steps


def _pick(data: list[Row], seed: int, place: int) -> Row:
    epoch, position = divmod(place, len(data))
    return data[permute(position, len(data), seed_for(seed, "data", epoch))]


def settings(**changes: Any) -> TrainSection:
    return TrainSection(
        **{"steps": 12, "rows_per_step": 5, "micro_batch_rows": 2, "save_every": 4, "lr": 1e-2} | changes
    )


def run(
    folder: Path,
    section: TrainSection | None = None,
    *,
    tuned: TinyTuned | None = None,
    precision: PrecisionSection | None = None,
    data: list[Row] | None = None,
    delay_seconds: float = 0.0,
    epochs: int = 1000,
    **rest: Any,
) -> Result:
    """Trains the tiny model in a folder with everything at its default."""
    section = section or settings()
    return train(
        tuned or TinyTuned(dropout=0.1),
        stream(data or rows(), section, epochs, delay_seconds),
        SFT(),
        section,
        precision or PrecisionSection(compute="fp32"),
        folder,
        total_steps=rest.pop("total_steps", section.steps or 1),
        collate=collate,
        **rest,
    )


def lasting(folder: Path) -> dict[str, bytes]:
    """All bytes of a run that a broken and resumed one must reproduce; `*_seconds`, `*_per_second`, `*_bytes` aside."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors" or file.name == "state.json":
            found[str(file.relative_to(folder))] = file.read_bytes()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    aside = ("_seconds", "_per_second", "_bytes")
    kept = [{key: value for key, value in line.items() if not key.endswith(aside)} for line in lines]
    found["metrics.jsonl"] = "\n".join(json.dumps(line) for line in kept).encode()
    return found


def evaluation(tuned: TinyTuned) -> Callable[[int], dict[str, float]]:
    """Loss on rows of its own; draws random numbers, as a sampling evaluation does."""

    def evaluate(step: int) -> dict[str, float]:
        torch.rand(7)
        batch = collate(rows(6, seed=99))
        with torch.no_grad():
            return {"loss": tuned.policy.token_losses(batch).mean().item()}

    return evaluate


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = TinyTuned(dropout=0.1)
    run(
        Path(sys.argv[1]),
        settings(steps=30, save_every=5),
        tuned=model,
        evaluate=evaluation(model),
        evaluate_every=4,
        resume="--resume" in sys.argv,
        delay_seconds=float(os.environ.get("STEP_DELAY", "0")),
    )
