"""How many parameters full tuning moves in bf16 at a small learning rate: python benchmarks/moved.py

The same rows and updates in fp32, in bf16 with fp32 masters, and in bf16 without: the share of parameters that the
optimizer has moved, the share of the model's own numbers that have changed, and the loss on rows that were not learnt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.first_steps import batch_of
from benchmarks.rows import make_steps
from benchmarks.seeds import over_seeds

WAYS = {"fp32": ("fp32", True), "bf16 with masters": ("bf16", True), "bf16 without": ("bf16", False)}


def main() -> None:
    """Runs every way with every seed and prints a row each."""
    options = over_seeds(__doc__, model="smollm2-135m", steps=4, rows=2, judged=16, lr=1e-5).parse_args()
    print("| | seed | moved by the optimizer | as many as fp32 | changed in the model | loss on other rows |")
    print("|---|---|---|---|---|---|", flush=True)
    for seed in range(options.seeds):
        exact = 0.0
        for way in WAYS:
            moved, changed, loss = tuned(options, way, seed)
            exact = exact or moved
            told = f"{100 * moved:.2f} % | {100 * moved / exact:.2f} % | {100 * changed:.2f} % | {loss:.4f}"
            print(f"| {way} | {seed} | {told} |", flush=True)


def tuned(options: argparse.Namespace, way: str, seed: int) -> tuple[float, float, float]:
    """Shares of parameters that moved, in the optimizer's numbers and in the model's, and the loss after."""
    import torch

    import tunesmith as ts
    from tunesmith.models.load import load
    from tunesmith.models.policy import Policy
    from tunesmith.models.stored import Stored
    from tunesmith.objectives.sft import SFT
    from tunesmith.parallel.layout import Single
    from tunesmith.train.optim import AdamW
    from tunesmith.train.precision import Precision
    from tunesmith.train.section import PrecisionSection
    from tunesmith.train.step import accumulate, fill_missing, update

    compute, master = WAYS[way]
    loaded = load(options.model, dtype=compute)  # type: ignore[arg-type]
    settings = {"data": "alpaca-demo", "max_length": 512, "lengths": "mixed", "prefix": 0, "seed": seed}
    count = options.steps + -(-options.judged // options.rows)
    steps = make_steps(settings | {"rows": options.rows, "steps": count}, loaded.folder)
    adapter = ts.Full().attach(loaded, "a", 0)
    policy, layout, objective = Policy(loaded, adapter.route).train(), Single(), SFT()
    precision = Precision(adapter.parameters, PrecisionSection(compute=compute, master=master), Stored(loaded).finer)  # type: ignore[arg-type]
    held = {name: (precision.masters[name], adapter.parameters[name]) for name in adapter.parameters}
    start = {name: tuple(one.detach().clone() for one in pair) for name, pair in held.items()}
    optimizer = AdamW(precision.masters)
    for rows in steps[: options.steps]:
        batches = [batch_of(rows)]
        accumulate(objective, policy, batches, precision, layout)
        fill_missing(precision.masters, first=False)
        update(optimizer, precision, layout, lr=options.lr, clip=1.0, rows=batches)
    numbers = sum(one.numel() for _, one in held.values())
    moved, changed = (
        sum(int((pair[at] != start[name][at]).sum()) for name, pair in held.items()) / numbers for at in (0, 1)
    )
    with torch.no_grad():
        told = [objective.loss(policy, batch_of(rows)) for rows in steps[options.steps :]]
    return moved, changed, float(sum(one.total for one in told)) / sum(one.weight for one in told)


if __name__ == "__main__":
    main()
