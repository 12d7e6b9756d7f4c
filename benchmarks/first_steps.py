"""What bfloat16 costs in the first steps: python benchmarks/first_steps.py [--steps 6]

The same rows, updates and learning rate for all, in one process: fp32, bf16 as it is, bf16 with every saving switched
off, and, where everything trains, two more: with masters that start from the rounded weights instead of the file's
numbers (they lie on bfloat16's grid, and small updates are rounded away at first), and these published by stochastic
rounding. Prints the loss of each step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import make_steps

WAYS = {
    "lora": ("fp32", "bf16", "bf16 plain"),
    "full": ("fp32", "bf16", "bf16 plain", "bf16, rounded masters", "bf16, stochastic rounding"),
}
RATES = {"lora": 2e-4, "full": 2e-5}


def main() -> None:
    """Runs every way and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="of an update")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="lora,full")
    options = parser.parse_args()
    for task in options.tasks.split(","):
        for way in WAYS[task]:
            losses = learn(options, task, way)
            print(f"{task:5} {way:28}", *(f"{loss:.4f}" for loss in losses), flush=True)


def learn(options: argparse.Namespace, task: str, way: str) -> list[float]:
    """The loss before each update."""
    import torch

    import tunesmith as ts
    from tunesmith.core.switches import SAVINGS, without
    from tunesmith.models.load import load
    from tunesmith.models.policy import Policy
    from tunesmith.models.stored import Stored
    from tunesmith.objectives.sft import SFT
    from tunesmith.parallel.layout import Single
    from tunesmith.train.optim import AdamW
    from tunesmith.train.precision import Precision
    from tunesmith.train.section import PrecisionSection
    from tunesmith.train.step import accumulate, fill_missing, update

    torch.manual_seed(0)
    loaded = load(options.model, dtype="fp32" if way == "fp32" else "bf16")
    settings = {"data": "alpaca-demo", "max_length": 512, "lengths": "mixed", "prefix": 0, "seed": 0}
    steps = make_steps(settings | {"rows": options.rows, "steps": options.steps}, loaded.folder)
    every = ("q", "k", "v", "o", "gate", "up", "down")
    method: Any = ts.LoRA(rank=16, alpha=32, targets=every) if task == "lora" else ts.Full()
    adapter = method.attach(loaded, "a", 0)
    policy, layout = Policy(loaded, adapter.route).train(), Single()
    rounded = way.endswith(("rounded masters", "stochastic rounding"))
    stored = (lambda name, held: None) if rounded else Stored(loaded).finer
    precision = Precision(adapter.parameters, PrecisionSection(), stored)
    optimizer, losses = AdamW(precision.masters), []
    with without(*(SAVINGS if way.endswith("plain") else ())):
        for rows in steps:
            batches = [batch_of(rows)]
            losses.append(accumulate(SFT(), policy, batches, precision, layout))
            fill_missing(precision.masters, first=False)
            update(optimizer, precision, layout, lr=RATES[task], clip=1.0, rows=batches)
            if way.endswith("rounding"):
                scatter(precision)
    return losses


def batch_of(rows: list[dict[str, Any]]) -> Any:
    """Rows as what a policy takes."""
    from tunesmith.data.batch import to_batch
    from tunesmith.data.encode import Example

    return to_batch([Example(row["ids"], row["supervised"], f"row:{number}") for number, row in enumerate(rows)])


def scatter(precision: Any) -> None:
    """Publishes masters rounded up or down at random, in proportion to how near they are."""
    import torch

    with torch.no_grad():
        for name, master in precision.masters.items():
            bits = master.view(torch.int32)
            moved = (bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)
            precision.parameters[name].copy_(moved.view(torch.float32))


if __name__ == "__main__":
    main()
