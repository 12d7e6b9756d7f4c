"""tunesmith against trl's SFTTrainer with peft's LoRA: python benchmarks/sft.py [--json]

Both train the same factors on the same rows in the same steps with the same optimizer, each through its own `train()`
in a process of its own. First an equality gate in fp32; then every setting of the other side in a fresh process, for
memory and to find its best; then the best of it and tunesmith in turns, A B B A, a block of steps each.
`speed_ratio` is ours / theirs in supervised tokens a second, `memory_ratio` ours / theirs in peak resident bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

SCREENED = "defaults padded packing packing-bf16 padding-free-4 padding-free-2 one-row"
GATE_STEPS = 3


def main() -> None:
    """Runs it all and prints a table, or one JSON document."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        result = bench.run()
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(table(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, or `tiny`: a random llama")
    parser.add_argument("--data", default="alpaca-demo", help="as `data.train` in a configuration")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each side, the dropped ones included")
    parser.add_argument("--block", type=int, default=3, help="steps in a turn")
    parser.add_argument("--rows", type=int, default=8, help="rows of an update")
    parser.add_argument("--micro-tokens", type=int, default=1024, help="tokens of our forward pass")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,k,v,o,gate,up,down")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--variants", default=SCREENED, help="settings of the other side to try; one: no screening")
    parser.add_argument("--skip-gate", action="store_true", help="without the comparison in fp32")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Worker:
    """One side, in a process that works when it is told to."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        side = "ours" if settings["variant"] in ("bf16", "fp32") else "theirs"
        self.name = settings["variant"] if side == "theirs" else f"tunesmith {settings['variant']}"
        path = Path(tempfile.mkstemp(dir=folder, suffix=".json")[1])
        path.write_text(json.dumps(settings))
        self.errors = path.with_suffix(".err")
        self.process = start([str(HERE / f"{side}.py"), "train", str(path)], settings["threads"], self.errors)
        self.ready = self.receive()

    def receive(self) -> dict[str, Any]:
        """The next document it sends."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n" + self.errors.read_text()[-3000:])
        return dict(json.loads(line))

    def block(self, steps: int) -> dict[str, Any]:
        """Lets it do some steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        return self.receive()

    def close(self) -> None:
        """Waits for its end, or ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(arguments: list[str], threads: int, errors: Path) -> subprocess.Popen[str]:
    """A Python process with so many threads, its stderr in a file."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with errors.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=ROOT,
            env=environment,
        )


class Bench:
    """One comparison."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        steps = max(options.steps, GATE_STEPS)
        self.settings: dict[str, Any] = {
            "folder": str(folder), "threads": options.threads, "model": options.model, "data": options.data,
            "max_length": options.max_length, "steps": steps, "rows": options.rows, "rank": options.rank,
            "micro_tokens": options.micro_tokens, "targets": options.targets.split(","), "lr": options.lr,
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """All stages."""
        say("preparing the steps")
        self.prepare()
        gate = None if self.options.skip_gate else self.gate()
        fresh = {name: self.fresh(name) for name in ["bf16", *self.options.variants.replace(",", " ").split()]}
        ours = fresh.pop("bf16")
        best = max(fresh, key=lambda name: fresh[name]["tokens_per_cpu_second"])
        say(f"the best setting of trl here is {best}")
        turns = self.turns(best)
        return {
            "speed_ratio": turns["speed_ratio"],
            "memory_ratio": ours["peak_bytes"] / fresh[best]["peak_bytes"],
            "loss_gap": turns["loss_gap"],
            "runs": {
                "best": best, "gate": gate, "turns": turns, "fresh": {"tunesmith": ours, **fresh},
                "machine": machine(self.options.threads), "settings": self.told,
            },
        }  # fmt: skip

    def prepare(self) -> None:
        """Writes the steps and the factors that both sides start from."""
        if self.options.model == "tiny":
            self.settings["model"] = tiny(self.folder / "tiny")
        path, errors = self.folder / "settings.json", self.folder / "prepare.err"
        path.write_text(json.dumps(self.settings))
        if start([str(HERE / "ours.py"), "prepare", str(path)], self.options.threads, errors).wait():
            raise SystemExit("preparing failed:\n" + errors.read_text()[-3000:])
        self.settings |= json.loads((self.folder / "prepared.json").read_text())
        steps = json.loads((self.folder / "steps.json").read_text())
        assert len(steps) >= self.options.steps, f"the data has rows for {len(steps)} steps only"
        assert all(len(step) == self.options.rows for step in steps)
        self.tokens = [sum(len(row["ids"]) for row in step) for step in steps]
        self.supervised = [sum(sum(row["supervised"]) for row in step) for step in steps]
        self.told = {k: v for k, v in self.settings.items() if k not in ("folder", "places", "model_folder")}
        self.told |= {"tokens_a_step": mean(self.tokens), "supervised_tokens_a_step": mean(self.supervised)}

    def worker(self, variant: str, use: list[int]) -> Worker:
        return Worker(self.settings | {"variant": variant, "use": use}, self.folder)

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

    def alone(self, variant: str, use: list[int], apart: int = 0) -> dict[str, Any]:
        """Some steps in a fresh process: the report of those after the first `apart`."""
        worker = self.worker(variant, use)
        if apart:
            self.checked(worker.block(apart), use[:apart])
        report = self.checked(worker.block(len(use) - apart), use[apart:])
        worker.close()
        return report | {"ready": worker.ready}

    def fresh(self, variant: str) -> dict[str, Any]:
        """Speed and peak memory of a setting in a process of its own; the largest step is the one not timed."""
        say(f"alone: {variant}")
        largest = max(range(len(self.tokens)), key=self.tokens.__getitem__)
        report = self.alone(variant, [largest, 0, 1], apart=1)
        supervised = self.supervised[0] + self.supervised[1]
        return {
            "peak_bytes": report["peak_bytes"],
            "imports_bytes": report["ready"]["imports_bytes"],
            "loaded_bytes": report["ready"]["loaded_bytes"],
            "tokens_per_second": supervised / report["wall_seconds"],
            # of one thread's seconds: what a busy neighbour costs is in the wall clock
            "tokens_per_cpu_second": supervised / report["cpu_seconds"],
            "largest_step_tokens": self.tokens[largest],
            "what": report["ready"]["what"],
        }

    def turns(self, best: str) -> dict[str, Any]:
        """Both sides in turns, A B B A; the first block of each is not counted."""
        use = list(range(self.options.steps))
        sides = {"tunesmith": self.worker("bf16", use), "trl": self.worker(best, use)}
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for round_, begin in enumerate(range(0, len(use), self.options.block)):
            part = use[begin : begin + self.options.block]
            for name in list(sides) if round_ % 2 == 0 else list(sides)[::-1]:
                report = self.checked(sides[name].block(len(part)), part)
                report |= {"use": part, "supervised": sum(self.supervised[i] for i in part)}
                blocks[name].append(report | {"tokens": sum(self.tokens[i] for i in part)})
                say(f"round {round_}: {name} {report['supervised'] / report['wall_seconds']:.1f} supervised tokens/s")
        for worker in sides.values():
            worker.close()
        return compare(blocks)


def compare(blocks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ratios of paired blocks, and how the losses of the same steps differ."""
    counted = {name: found[1:] or found for name, found in blocks.items()}
    pairs = list(zip(counted["tunesmith"], counted["trl"], strict=True))
    wall = [theirs["wall_seconds"] / ours["wall_seconds"] for ours, theirs in pairs]
    cpu = [theirs["cpu_seconds"] / ours["cpu_seconds"] for ours, theirs in pairs]
    losses = {name: [step["loss"] for block in found for step in block["steps"]] for name, found in blocks.items()}
    gaps = [abs(a - b) / b for a, b in zip(losses["tunesmith"], losses["trl"], strict=True)]
    return {
        "speed_ratio": statistics.median(wall),
        "speed_ratios": wall,
        "cpu_ratio": statistics.median(cpu),
        "cpu_ratios": cpu,
        "loss_gap": abs(mean(losses["tunesmith"]) - mean(losses["trl"])) / mean(losses["trl"]),
        "largest_loss_gap": max(gaps),
        "losses": losses,
        **{name: rates(found) for name, found in counted.items()},
    }


def rates(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second of one side over its blocks, and what the machine gave around them."""
    seconds = [block["wall_seconds"] for block in blocks]
    ceilings = [value for block in blocks for value in block["ceiling_gflops"]]
    return {
        "supervised_tokens_per_second": statistics.median(b["supervised"] / b["wall_seconds"] for b in blocks),
        "tokens_per_second": statistics.median(b["tokens"] / b["wall_seconds"] for b in blocks),
        "tokens_per_cpu_second": statistics.median(b["tokens"] / b["cpu_seconds"] for b in blocks),
        "seconds": seconds,
        "ceiling_gflops": {"median": statistics.median(ceilings), "low": min(ceilings), "high": max(ceilings)},
    }


def tiny(folder: Path) -> str:
    """A random llama of a few thousand parameters with a tokenizer, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer_folder

    tiny_tokenizer_folder(folder)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2, bos_token_id=None, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def machine(threads: int) -> dict[str, Any]:
    """Where this ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = {package: version(package) for package in ("torch", "transformers", "trl", "peft", "accelerate")}
    return {"cpu": name, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0], **packages}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    runs, turns = result["runs"], result["runs"]["turns"]
    lines = [f"{'':24}{'supervised tok/s':>18}{'real tok/s':>12}{'tok/CPU-s':>11}{'peak MB':>9}"]
    for name, alone in (("tunesmith", "tunesmith"), ("trl", runs["best"])):
        rate, peak = turns[name], runs["fresh"][alone]["peak_bytes"] / 1e6
        label = name if name == alone else f"trl, {alone}"
        lines.append(
            f"{label:24}{rate['supervised_tokens_per_second']:18.1f}{rate['tokens_per_second']:12.1f}"
            f"{rate['tokens_per_cpu_second']:11.1f}{peak:9.0f}"
        )
    low, high = min(turns["speed_ratios"]), max(turns["speed_ratios"])
    lines += [
        f"speed ratio {result['speed_ratio']:.2f} ({low:.2f} to {high:.2f}; by CPU seconds {turns['cpu_ratio']:.2f}), "
        f"memory ratio {result['memory_ratio']:.2f}",
        f"losses: mean gap {result['loss_gap']:.1e}, largest of a step {turns['largest_loss_gap']:.1e}; "
        f"from {turns['losses']['tunesmith'][0]:.3f} to {turns['losses']['tunesmith'][-1]:.3f}",
    ]
    if runs["gate"]:
        lines.append(
            f"fp32: first loss differs by {runs['gate']['first_gap']:.1e}, any by {runs['gate']['largest_gap']:.1e}"
        )
    lines.append("settings of trl alone, supervised tokens per CPU second and peak MB:")
    for name, alone in runs["fresh"].items():
        lines.append(f"  {name:22}{alone['tokens_per_cpu_second']:10.1f}{alone['peak_bytes'] / 1e6:9.0f}")
    return "\n".join(lines)


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
