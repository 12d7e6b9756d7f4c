"""What each saving is worth: python benchmarks/ablate.py [--json]

One process, one model, one update at a time: forward and backward of all micro-batches, the gradient's norm and the
optimizer's step at learning rate 0, so that every update starts from the same numbers and losses and norms have to
agree. Every round does the same update each way, in alternating order: with every saving, without each alone, and
without the first one, the first two, and so on to the plain path. A ratio compares a way with all savings in its own
round. Peak bytes are counted apart from the timing; they are of tensors beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ours import attached, cut
from benchmarks.rows import LENGTHS, make_steps
from benchmarks.sft import TASKS, method_of
from benchmarks.turns import live_storages
from benchmarks.workers import described, machine, say, spread, tiny, told
from tunesmith.core.switches import SAVINGS, without

ALL = "with all"
Update = Callable[[int], tuple[float, float]]  # of a step's index: loss, norm of the gradient


def main() -> None:
    """Measures, and prints a table or one JSON document."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    result = measure(options)
    print(json.dumps(result, indent=1) if options.json else table(result))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="lora", choices=TASKS)
    parser.add_argument("--lengths", default="mixed", choices=LENGTHS)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all rows begin with, besides their own")
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, or `tiny`")
    parser.add_argument("--data", default="alpaca-demo")
    parser.add_argument("--rows", type=int, default=0, help="of an update; 0: what the lengths say")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; one more warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without the cumulative rows")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def ways(alone: bool = False) -> dict[str, tuple[str, ...]]:
    """What is switched off, by name: nothing, each, and ever more."""
    found: dict[str, tuple[str, ...]] = {ALL: ()} | {f"without {name}": (name,) for name in SAVINGS}
    names = tuple(SAVINGS)
    more = {f"and without {names[count - 1]}": names[:count] for count in range(2, len(names) + 1)}
    return found if alone else found | more


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and what they come to."""
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        update, tokens = prepare(options, Path(folder))
    wanted = ways(options.alone)
    update(0)  # what the optimizer remembers is made once, and is nobody's peak
    peaks = {name: peak(update, off, max(range(len(tokens)), key=tokens.__getitem__)) for name, off in wanted.items()}
    rounds: list[dict[str, tuple[float, float, float]]] = []
    for turn in range(options.rounds + 1):
        found = {name: timed(update, wanted[name], turn) for name in list(wanted)[:: -1 if turn % 2 else 1]}
        say(f"round {turn}: {found[ALL][0]:.2f} s with all")
        if turn:
            rounds.append(found)
    return {
        "ways": {name: summary(rounds, name, peaks) for name in wanted},
        "seconds": [found[ALL][0] for found in rounds],
        "tokens_a_step": sum(tokens[1:]) / len(rounds),
        "machine": machine(options.threads),
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "threads", "alone")},
    }


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Update, list[int]]:
    """A model with its method, and how to do an update of it; the tokens of each."""
    from tunesmith.core.types import Batch
    from tunesmith.data.batch import to_batch
    from tunesmith.data.encode import Example
    from tunesmith.models.load import load
    from tunesmith.models.policy import Policy
    from tunesmith.objectives.sft import SFT
    from tunesmith.parallel.layout import Single
    from tunesmith.train import step
    from tunesmith.train.optim import AdamW
    from tunesmith.train.precision import Precision
    from tunesmith.train.section import PrecisionSection

    loaded = load(tiny(folder / "tiny") if options.model == "tiny" else options.model, dtype=options.precision)
    adapter = attached({"method": method_of(options)}, loaded)
    if options.task != "full":
        disturb(adapter.parameters)
    policy = Policy(loaded, adapter.route).train()
    precision = Precision(adapter.parameters, PrecisionSection(compute=options.precision))
    optimizer, layout = AdamW(precision.masters, weight_decay=0.0, lr_factors={}), Single()
    rows = options.rows or LENGTHS[options.lengths].rows
    settings = vars(options) | {"rows": rows, "steps": options.rounds + 1, "max_length": 4096}
    steps: list[list[Batch]] = []
    for number, found in enumerate(make_steps(settings, loaded.folder)):
        examples = [Example(row["ids"], row["supervised"], f"row:{number}") for row in found]
        steps.append([to_batch(each) for each in cut(examples, number, options.micro_tokens).micro_batches])

    def update(index: int) -> tuple[float, float]:
        loss = step.accumulate(SFT(), policy, steps[index], precision, layout)
        step.fill_missing(optimizer.masters, first=False)
        return loss, step.update(optimizer, precision, layout, lr=0.0, clip=1.0)

    return update, [sum(int(batch.ids.numel()) for batch in batches) for batches in steps]


def disturb(parameters: dict[str, Any]) -> None:
    """Gives fresh factors something to say, so that all gradients are there."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.01)


def timed(update: Update, off: tuple[str, ...], index: int) -> tuple[float, float, float]:
    """Seconds, loss and norm of an update without some savings."""
    with without(*off):
        begun = time.perf_counter()
        loss, norm = update(index)
        return time.perf_counter() - begun, loss, norm


def peak(update: Update, off: tuple[str, ...], index: int) -> int:
    """The most bytes of tensors made within an update that are alive at once."""
    with without(*off), live_storages() as live:
        update(index)
    return int(live.peak_all_bytes)


def summary(rounds: list[dict[str, tuple[float, float, float]]], name: str, peaks: dict[str, int]) -> dict[str, Any]:
    """Of one way: its time in that of all savings, its peak, and how far its losses and norms are from theirs."""
    gaps = [[abs(found[name][at] / found[ALL][at] - 1) for found in rounds] for at in (1, 2)]
    return {
        "time": spread([found[name][0] / found[ALL][0] for found in rounds]),
        "peak_bytes": peaks[name],
        "peak": peaks[name] / peaks[ALL],
        "loss_gap": max(gaps[0]),
        "norm_gap": max(gaps[1]),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    settings = result["settings"]
    lines = [
        described(result["machine"]),
        f"{settings['model']}, {settings['task']}, {settings['precision']}, lengths {settings['lengths']}, prefix "
        f"{settings['prefix']}, {result['tokens_a_step']:.0f} tokens an update, {len(result['seconds'])} rounds",
        "",
        "| | time | peak of tensors | beside all savings | largest gap of losses | of gradient norms |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"| {name} | {told(way['time'])} | {way['peak_bytes'] / 1e6:,.0f} MB | {way['peak']:.2f} "
            f"| {way['loss_gap']:.1e} | {way['norm_gap']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
