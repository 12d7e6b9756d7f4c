"""LoRA at 1 and 8 billion parameters on a GPU: python benchmarks/gpu.py [--minutes 8] [--json]

Random weights of published shapes, random tokens, rows laid end to end up to `--tokens` an update: no network. For each
shape tunesmith stays up and takes turns, A B B A, with one peer after another: trl + peft packed without and with
recomputation, its defaults, with liger-kernel and with Unsloth where these can be imported. Tokens a second, useful
FLOPs over those of a measured 8192 cubed product (MFU), peak memory allocated, and the first loss of both, which has to
be the same. A peer that fails or for which no time is left is named, and the rest goes on.

It has not been run on a GPU yet: none was at hand. Its logic is tested by `--device cpu --shapes tiny`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_sides import ROWS, STEPS
from benchmarks.roofline import SHAPES, shape_of, step_work
from benchmarks.workers import EndedEarlyError, Worker, described, machine, say, spread, told
from tests.tiny import tiny_tokenizer_folder

# a peer to what is set, and the package that it needs
PEERS: dict[str, tuple[dict[str, Any], str]] = {
    "trl packed": ({"layout": "packed", "numbers": "bf16", "checkpointing": False}, "trl"),
    "liger packed": ({"layout": "packed", "numbers": "bf16", "checkpointing": False, "liger": True}, "liger_kernel"),
    "unsloth packed": ({"layout": "packed", "numbers": "bf16", "checkpointing": False, "unsloth": True}, "unsloth"),
    "trl packed, recomputing": ({"layout": "packed", "numbers": "bf16", "checkpointing": True}, "trl"),
    "trl defaults": ({"layout": "padded", "numbers": "amp", "checkpointing": True}, "trl"),
}  # fmt: skip


def main() -> None:
    """Measures, and prints a table or one JSON document."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result, indent=1) if options.json else table(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-1b,llama-8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=4096, help="of an update")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peers", default=";".join(PEERS), help="names, with ; between them")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of blocks with a peer at most, one warms up")
    parser.add_argument("--block", type=int, default=3, help="steps in a turn")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All shapes with all peers, as far as time goes."""
    begun = time.monotonic()
    tiny_tokenizer_folder(folder / "tokenizer")
    shapes = options.shapes.split(",")
    found: dict[str, Any] = {}
    for number, shape in enumerate(shapes):
        # the larger half of what is left goes to the larger shapes, which come last
        left = options.minutes * 60 - (time.monotonic() - begun)
        until = time.monotonic() + left / (1 if number == len(shapes) - 1 else 2.5)
        steps = make_steps(options.tokens, SHAPES[shape]["vocab_size"])
        path = folder / f"{shape}.json"
        path.write_text(json.dumps(steps))
        settings = {
            "shape": shape, "steps": str(path), "device": options.device, "threads": options.threads,
            "rank": options.rank, "tokenizer": str(folder / "tokenizer"), "micro_tokens": options.tokens,
        }  # fmt: skip
        found[shape] = Contest(settings, options, folder, steps, until).run()
    kept = {k: v for k, v in vars(options).items() if k != "json"}
    return {"shapes": found, "seconds": time.monotonic() - begun, "machine": machine(options.threads), "settings": kept}


def make_steps(tokens: int, vocabulary: int) -> list[list[dict[str, Any]]]:
    """Updates of rows whose lengths are lognormal and come to `tokens`; common tokens are common; half is learnt."""
    source = random.Random(0)
    found = []
    for _ in range(STEPS):
        drawn = [source.lognormvariate(0, 0.5) for _ in range(ROWS)]
        lengths = [max(4, int(tokens * each / sum(drawn))) for each in drawn]
        rows = []
        for length in lengths:
            ids = [3 + int((vocabulary - 3) ** source.random()) - 1 for _ in range(length)]
            rows.append({"ids": ids, "supervised": [at >= length - length // 2 for at in range(length)]})
        found.append(rows)
    return found


class Contest:
    """One shape: tunesmith, and one peer after another."""

    def __init__(
        self, settings: dict[str, Any], options: argparse.Namespace, folder: Path, steps: list[Any], until: float
    ) -> None:
        self.settings, self.options, self.folder, self.until = settings, options, folder, until
        shape = shape_of(settings["shape"])
        self.flops = [
            step_work(shape, [len(row["ids"]) for row in step], sum(sum(row["supervised"]) for row in step),
                      rank=options.rank).flops
            for step in steps
        ]  # fmt: skip
        self.tokens = [sum(len(row["ids"]) for row in step) for step in steps]

    def run(self) -> dict[str, Any]:
        """All peers."""
        say(f"{self.settings['shape']}: tunesmith")
        found: dict[str, Any] = {"peers": {}}
        try:
            ours = Worker("gpu_sides.py", self.settings | {"variant": "tunesmith", "peer": None}, self.folder).wait()
        except EndedEarlyError as error:
            return found | {"failed": last_line(error)}
        self.at, self.first_loss = {"tunesmith": 0}, 0.0
        blocks: list[dict[str, Any]] = []
        for name in self.options.peers.split(";"):
            peer, package = PEERS[name.strip()]
            if importlib.util.find_spec(package) is None:
                found["peers"][name] = {"failed": f"{package} is not installed"}
            elif time.monotonic() > self.until:
                found["peers"][name] = {"failed": "no time left"}
            else:
                say(f"{self.settings['shape']}: {name}")
                found["peers"][name] = self.pairs(ours, name, peer, blocks)
        if not blocks:
            blocks = [self.block(ours, "tunesmith") for _ in range(3)]
            self.first_loss = blocks[0]["steps"][0]["loss"]
        ours.close()
        mine = rates(blocks) | {"first_loss": self.first_loss}
        return found | {"tunesmith": mine, "parameters": ours.ready["parameters"]}

    def pairs(self, ours: Worker, name: str, peer: dict[str, Any], kept: list[dict[str, Any]]) -> dict[str, Any]:
        """Turns with one peer."""
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        worker = Worker("gpu_sides.py", self.settings | {"variant": name, "peer": peer}, self.folder)
        try:
            worker.wait()
            self.at[name] = 0
            for turn in range(self.options.rounds):
                order = ((ours, "tunesmith"), (worker, name))
                both = {which: self.block(side, which) for side, which in order[:: -1 if turn % 2 else 1]}
                pairs.append((both["tunesmith"], both[name]))
                if time.monotonic() > self.until and turn >= 1:
                    break
        except EndedEarlyError as error:
            return {"failed": last_line(error)}
        finally:
            worker.close()
        timed = pairs[1:] or pairs
        kept += [us for us, _ in timed]
        self.first_loss = self.first_loss or pairs[0][0]["steps"][0]["loss"]
        measured = "device_bytes" in timed[-1][0]
        return {
            **rates([them for _, them in timed]),
            "speed": spread([per_token(them) / per_token(us) for us, them in timed]),
            "memory": timed[-1][0]["device_bytes"] / timed[-1][1]["device_bytes"] if measured else None,
            "first_loss": pairs[0][1]["steps"][0]["loss"],
        }

    def block(self, worker: Worker, name: str) -> dict[str, Any]:
        """Some steps of one side."""
        report = worker.block(self.options.block)
        part = [(self.at[name] + index) % STEPS for index in range(self.options.block)]
        self.at[name] += self.options.block
        return report | {"tokens": sum(self.tokens[i] for i in part), "flops": sum(self.flops[i] for i in part)}


def per_token(block: dict[str, Any]) -> float:
    return float(block["wall_seconds"] / block["tokens"])


def rates(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """What one side did."""
    shares = [b["flops"] / b["wall_seconds"] / (1e9 * max(b["ceiling_gflops"])) for b in blocks]
    return {
        "tokens_per_second": statistics.median(1 / per_token(block) for block in blocks),
        "mfu": spread(shares),
        "ceiling_tflops": statistics.median(max(b["ceiling_gflops"]) for b in blocks) / 1e3,
        "device_bytes": blocks[-1].get("device_bytes", blocks[-1]["peak_bytes"]),
    }


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["ended"])[-1][:160]


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    settings = result["settings"]
    lines = [
        described(result["machine"]),
        f"{settings['device']}, LoRA of rank {settings['rank']} on all maps, {settings['tokens']} tokens an update, "
        f"{result['seconds']:.0f} s in all",
        "",
        "| | tokens/s | MFU | of TFLOP/s | peak memory | times as slow as tunesmith | our memory in its | first loss |",
        "|" + "---|" * 8,
    ]
    for shape, contest in result["shapes"].items():
        sides = {"tunesmith": contest.get("tunesmith", contest), **contest["peers"]}
        for name, side in sides.items():
            if "failed" in side:
                lines.append(f"| {shape}, {name} | {side['failed']} |" + " |" * 6)
                continue
            ratio = f"{told(side['speed'])}" if "speed" in side else "1"
            memory = f"{side['memory']:.2f}" if side.get("memory") else ""
            lines.append(
                f"| {shape}, {name} | {side['tokens_per_second']:,.0f} | {100 * side['mfu']['median']:.0f} % "
                f"| {side['ceiling_tflops']:.1f} | {side['device_bytes'] / 1e9:.2f} GB | {ratio} | {memory} "
                f"| {side['first_loss']:.4f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
