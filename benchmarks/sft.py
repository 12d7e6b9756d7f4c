"""tunesmith against trl's SFTTrainer: python benchmarks/sft.py [--task --lengths --precision --prefix] [--json]

Both train the same on the same rows in the same steps with the same optimizer, each through its own `train()` in a
process of its own. First an equality gate in fp32; then every setting of the other side in a fresh process, for memory
and to find its best; then tunesmith, that best and trl's defaults in turns, A B C C B A, a block of steps each.
`speed_ratio` is ours / theirs in supervised tokens a second, `memory_ratio` ours / theirs in peak resident bytes,
`tensor_ratio` in peak bytes of live tensors (counted in processes of their own). `--suite` runs all cells of
`suite.py`, keeps each in a file, goes on where it was stopped, and prints a table beside the targets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.roofline import ALL_MAPS, step_work
from benchmarks.rows import LENGTHS
from benchmarks.workers import EndedEarlyError, Worker, described, machine, prepared, say, spread, told

SCREENED = "defaults padding-free packing packing-bf16 padding-free-4 padding-free-2 one-row one-row-bf16"
# what is screened elsewhere: without masters small updates of bf16 weights are lost, so full tuning has no such variant
SCREENED_FULL = "defaults padding-free packing padding-free-4 padding-free-2 one-row"
SCREENED_FP32 = "packing-fp32 padding-free-fp32 padding-free-2-fp32 one-row-fp32"
TASKS = {"lora": ALL_MAPS, "lora-qv": ("q", "v"), "full": ()}
GATE_STEPS = 3


def main() -> None:
    """Runs one comparison or all, and prints a table or one JSON document."""
    options = parser().parse_args()
    if options.suite:
        from benchmarks import suite

        return suite.main(options)
    result = compared(options)
    print(json.dumps(result, indent=1) if options.json else table(result))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="lora", choices=TASKS, help="LoRA on all linear maps, on q v; or everything")
    parser.add_argument("--lengths", default="mixed", choices=("real", *LENGTHS), help="of rows; see rows.py")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all rows begin with, besides their own")
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, or `tiny`: a random llama")
    parser.add_argument("--data", default="alpaca-demo", help="as `data.train` in a configuration")
    parser.add_argument("--max-length", type=int, default=512, help="of real rows")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each side, the dropped ones included")
    parser.add_argument("--block", type=int, default=3, help="steps in a turn")
    parser.add_argument("--rows", type=int, default=0, help="rows of an update; 0: what the lengths say, or 8")
    parser.add_argument("--micro-tokens", type=int, default=1024, help="tokens of our forward pass; tune's default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4, help="a tenth of it where everything trains")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--variants", default="", help="settings of the other side to try (theirs.py)")
    parser.add_argument("--skip-gate", action="store_true", help="without the comparison in fp32")
    parser.add_argument("--skip-tensors", action="store_true", help="without counting live tensors")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--suite", action="store_true", help="all cells")
    parser.add_argument("--cells", default="", help="of the suite, by name; all if empty")
    parser.add_argument("--out", default="runs/benchmark-sft", help="where the suite keeps its cells")
    return parser


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """One comparison."""
    with tempfile.TemporaryDirectory() as folder:
        return Bench(options, Path(folder)).run()


def method_of(options: argparse.Namespace) -> dict[str, Any]:
    """The task as tunesmith's `method` section."""
    if options.task == "full":
        return {"kind": "full"}
    return {"kind": "lora", "rank": options.rank, "alpha": 2.0 * options.rank, "targets": list(TASKS[options.task])}


class Bench:
    """One comparison."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        full = options.task == "full"
        rows = options.rows or (8 if options.lengths == "real" else LENGTHS[options.lengths].rows)
        max_length = options.max_length if options.lengths == "real" else 4096
        self.settings: dict[str, Any] = {
            "folder": str(folder), "threads": options.threads, "model": options.model, "data": options.data,
            "max_length": max_length, "steps": max(options.steps, GATE_STEPS), "rows": rows, "prefix": options.prefix,
            "lengths": options.lengths, "micro_tokens": options.micro_tokens, "lr": options.lr / (10 if full else 1),
            "method": method_of(options), "precision": options.precision,
        }  # fmt: skip
        screened = SCREENED_FP32 if options.precision == "fp32" else SCREENED_FULL if full else SCREENED
        self.variants = (options.variants or screened).replace(",", " ").split()

    def run(self) -> dict[str, Any]:
        """All stages."""
        say("preparing the steps")
        self.prepare()
        gate = None if self.options.skip_gate else self.gate()
        fresh = {name: self.fresh(name) for name in [self.options.precision, *self.variants]}
        ours = fresh.pop(self.options.precision)
        rate = {name: alone.get("tokens_per_cpu_second", 0.0) for name, alone in fresh.items()}
        best = max(rate, key=lambda name: rate[name])
        say(f"the best setting of trl here is {best}")
        rivals = [best] + [name for name in fresh if name == "defaults" != best and rate[name]]
        turns = self.turns(rivals)
        tensors = {} if self.options.skip_tensors else self.tensors([self.options.precision, *rivals])
        pairs = {name: against(turns, name, ours, fresh[name], tensors) for name in rivals}
        return {
            **pairs[best],
            "defaults": pairs.get("defaults"),  # which may be its best
            "share_of_ceiling": turns["tunesmith"]["share_of_ceiling"]["median"],
            "runs": {
                "best": best, "gate": gate, "turns": turns, "tensors": tensors, "fresh": {"tunesmith": ours, **fresh},
                "machine": machine(self.options.threads), "settings": self.told,
            },
        }  # fmt: skip

    def prepare(self) -> None:
        """Writes the steps and the factors that both sides start from, and counts them."""
        from tunesmith.plan.shape import read_shape

        self.settings |= prepared(self.settings, self.folder)
        steps = json.loads((self.folder / "steps.json").read_text())
        assert len(steps) >= self.options.steps, f"the data has rows for {len(steps)} steps only"
        assert all(len(step) == self.settings["rows"] for step in steps)
        lengths = [[len(row["ids"]) for row in step] for step in steps]
        self.tokens = [sum(each) for each in lengths]
        self.supervised = [sum(sum(row["supervised"]) for row in step) for step in steps]
        shape, method = read_shape(self.settings["model_folder"]), self.settings["method"]
        lora = {"rank": method["rank"], "targets": method["targets"]} if method["kind"] == "lora" else {}
        size = 2 if self.options.precision == "bf16" else 4
        self.flops = [
            step_work(shape, each, supervised, prefix=self.options.prefix, item_bytes=size, **lora).flops
            for each, supervised in zip(lengths, self.supervised, strict=True)
        ]
        self.told = {k: v for k, v in self.settings.items() if k not in ("folder", "places", "model_folder")}
        self.told["model"] = self.options.model
        means = {"tokens": self.tokens, "supervised_tokens": self.supervised, "useful_flops": self.flops}
        self.told |= {f"{name}_a_step": statistics.fmean(values) for name, values in means.items()}

    def worker(self, variant: str, use: list[int], count: bool = False) -> Worker:
        script = "ours.py" if variant in ("bf16", "fp32") else "theirs.py"
        return Worker(script, self.settings | {"variant": variant, "use": use, "count": count}, self.folder).wait()

    def checked(self, report: dict[str, Any], use: list[int]) -> dict[str, Any]:
        """A block's report, once the library itself has counted the tokens that we sent it."""
        counted = [step["supervised_tokens"] for step in report["steps"]]
        assert counted == [self.supervised[index] for index in use], (counted, use)
        return report

    def gate(self) -> dict[str, Any]:
        """Losses of both sides in fp32: the first one, and the largest relative difference of all."""
        say("the equality gate in fp32")
        use = list(range(GATE_STEPS))
        losses = [[step["loss"] for step in self.alone(name, use)["steps"]] for name in ("fp32", "packing-fp32")]
        gaps = [abs(a - b) / b for a, b in zip(*losses, strict=True)]
        assert gaps[0] < 2e-6, f"the sides do not compute the same loss: {losses}"
        assert max(gaps) < 1e-4, f"the sides do not make the same updates: {losses}"
        return {"tunesmith": losses[0], "trl": losses[1], "first_gap": gaps[0], "largest_gap": max(gaps)}

    def alone(self, variant: str, use: list[int], apart: int = 0, count: bool = False) -> dict[str, Any]:
        """Some steps in a fresh process: the report of those after the first `apart`."""
        worker = self.worker(variant, use, count)
        if apart:
            self.checked(worker.block(apart), use[:apart])
        report = self.checked(worker.block(len(use) - apart), use[apart:])
        worker.close()
        return report | {"ready": worker.ready}

    @property
    def largest(self) -> int:
        """The step with most tokens."""
        return max(range(len(self.tokens)), key=self.tokens.__getitem__)

    def fresh(self, variant: str) -> dict[str, Any]:
        """Speed and peak memory of a setting in a process of its own; the largest step is the one not timed."""
        say(f"alone: {variant}")
        try:
            report = self.alone(variant, [self.largest, 0, 1], apart=1)
        except EndedEarlyError as error:
            say(str(error))
            return {"failed": str(error)[-500:]}
        supervised = self.supervised[0] + self.supervised[1]
        return {
            "peak_bytes": report["peak_bytes"],
            "imports_bytes": report["ready"]["imports_bytes"],
            "loaded_bytes": report["ready"]["loaded_bytes"],
            "tokens_per_second": supervised / report["wall_seconds"],
            # of one thread's seconds: what a busy neighbour costs is in the wall clock
            "tokens_per_cpu_second": supervised / report["cpu_seconds"],
            "largest_step_tokens": self.tokens[self.largest],
            "what": report["ready"]["what"],
        }

    def tensors(self, variants: list[str]) -> dict[str, int]:
        """Peak bytes of tensors alive at once over the largest step and another one, the model's among them."""
        say("counting tensors")
        return {name: self.alone(name, [self.largest, 0], count=True)["tensor_bytes"] for name in variants}

    def turns(self, rivals: list[str]) -> dict[str, Any]:
        """All sides in turns, A B B A; the first block of each is not counted."""
        use = list(range(self.options.steps))
        sides = {name: self.worker(name, use) for name in [self.options.precision, *rivals]}
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for round_, begin in enumerate(range(0, len(use), self.options.block)):
            part = use[begin : begin + self.options.block]
            for name in list(sides) if round_ % 2 == 0 else list(sides)[::-1]:
                report = self.checked(sides[name].block(len(part)), part)
                for what, values in (("supervised", self.supervised), ("tokens", self.tokens), ("flops", self.flops)):
                    report[what] = sum(values[index] for index in part)  # type: ignore[call-overload]
                blocks[name].append(report | {"use": part})
                say(f"round {round_}: {name} {report['supervised'] / report['wall_seconds']:.1f} supervised tokens/s")
        for worker in sides.values():
            worker.close()
        ours = blocks.pop(self.options.precision)
        return {
            "tunesmith": rates(ours),
            **{name: rates(found) | compare(ours, found) for name, found in blocks.items()},
        }


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of paired blocks, the first pair aside, and how the losses of the same steps differ."""
    pairs = list(zip(ours, theirs, strict=True))
    timed = pairs[1:] or pairs
    losses = [[step["loss"] for block in found for step in block["steps"]] for found in (ours, theirs)]
    means = [statistics.fmean(each) for each in losses]
    return {
        "speed": spread([them["wall_seconds"] / us["wall_seconds"] for us, them in timed]),
        "cpu": spread([them["cpu_seconds"] / us["cpu_seconds"] for us, them in timed]),
        "loss_gap": abs(means[0] - means[1]) / means[1],
        "largest_loss_gap": max(abs(a - b) / b for a, b in zip(*losses, strict=True)),
    }


def rates(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """What one side did over its blocks, the first aside, and what the machine gave around them."""
    counted = blocks[1:] or blocks
    ceilings = [value for block in counted for value in block["ceiling_gflops"]]
    shares = [b["flops"] / b["wall_seconds"] / (1e9 * statistics.fmean(b["ceiling_gflops"])) for b in counted]
    return {
        "supervised_tokens_per_second": statistics.median(b["supervised"] / b["wall_seconds"] for b in counted),
        "tokens_per_second": statistics.median(b["tokens"] / b["wall_seconds"] for b in counted),
        "tokens_per_cpu_second": statistics.median(b["tokens"] / b["cpu_seconds"] for b in counted),
        "share_of_ceiling": spread(shares),
        "seconds": [block["wall_seconds"] for block in counted],
        "ceiling_gflops": spread(ceilings),
        "losses": [step["loss"] for block in blocks for step in block["steps"]],
    }


def against(
    turns: dict[str, Any], rival: str, ours: dict[str, Any], theirs: dict[str, Any], tensors: dict[str, int]
) -> dict[str, Any]:
    """The ratios that a comparison comes to."""
    found = turns[rival]
    counted = list(tensors.values())
    return {
        "speed_ratio": found["speed"]["median"],
        "speed": found["speed"],
        "cpu_ratio": found["cpu"]["median"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        # without what both have before a model is there
        "net_memory_ratio": (ours["peak_bytes"] - ours["imports_bytes"])
        / (theirs["peak_bytes"] - theirs["imports_bytes"]),
        "tensor_ratio": counted[0] / tensors[rival] if tensors else None,
        "loss_gap": found["loss_gap"],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    runs = result["runs"]
    turns, settings = runs["turns"], runs["settings"]
    lines = [
        described(runs["machine"]),
        f"{settings['model']}, {settings['method']}, {settings['precision']}, lengths {settings['lengths']}, "
        f"prefix {settings['prefix']}: {settings['rows']} rows, {settings['tokens_a_step']:.0f} tokens an update, "
        f"{settings['supervised_tokens_a_step']:.0f} of them supervised",
        "",
        "| | supervised tokens/s | tokens/s | tokens per CPU second | share of ceiling | peak, resident "
        "| of that imports | peak of tensors | times as slow | by CPU seconds | losses differ by |",
        "|" + "---|" * 11,
    ]
    for name, rate in turns.items():
        alone = runs["fresh"][name]
        counted = runs["tensors"].get(settings["precision"] if name == "tunesmith" else name)
        ratios = "1 | 1 | "
        if name != "tunesmith":
            ratios = f"{told(rate['speed'])} | {told(rate['cpu'])} | {rate['loss_gap']:.1e}"
        lines.append(
            f"| {name} | {rate['supervised_tokens_per_second']:.1f} | {rate['tokens_per_second']:.1f} "
            f"| {rate['tokens_per_cpu_second']:.1f} | {100 * rate['share_of_ceiling']['median']:.0f} % "
            f"| {alone['peak_bytes'] / 1e6:,.0f} MB | {alone['imports_bytes'] / 1e6:,.0f} MB "
            f"| {f'{counted / 1e6:,.0f} MB' if counted else 'not counted'} | {ratios} |"
        )
    if runs["gate"]:
        lines.append("")
        lines.append(
            f"fp32: first loss differs by {runs['gate']['first_gap']:.1e}, any by {runs['gate']['largest_gap']:.1e}"
        )
    lines += [
        "",
        "| alone, each in a fresh process | supervised tokens per CPU second | peak, resident |",
        "|---|---|---|",
    ]
    for name, alone in runs["fresh"].items():
        if "failed" in alone:
            lines.append(f"| {name} | failed | {alone['failed'].splitlines()[-1][:80]} |")
        else:
            lines.append(f"| {name} | {alone['tokens_per_cpu_second']:.1f} | {alone['peak_bytes'] / 1e6:,.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
