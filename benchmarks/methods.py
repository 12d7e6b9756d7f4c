"""Every method against full tuning: python benchmarks/methods.py [--methods NAME,...] [--json]

Steps: full tuning and a method take turns, A B B A, each through tunesmith's trainer in a process of its own, on the
same rows; `time` is of a step in that of full tuning beside it. Memory: peak resident bytes of the method's process and
of what it has before a model is there, and peak bytes of live tensors, counted in a process of its own. Answers: as in
`latency.py`, beside the base and merged into it, in processor seconds over the base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import latency
from benchmarks.roofline import ALL_MAPS
from benchmarks.rows import LENGTHS
from benchmarks.workers import EndedEarlyError, Worker, described, machine, prepared, say, spread, told

FULL = "full"
METHODS: dict[str, dict[str, Any]] = {
    FULL: {"kind": "full"},
    "lora all maps": {"kind": "lora", "rank": 16, "targets": list(ALL_MAPS)},
    "lora q v": {"kind": "lora", "rank": 16},
    "dora q v": {"kind": "lora", "rank": 16, "dora": True},
    "pissa q v": {"kind": "lora", "rank": 16, "init": "pissa"},
    "adapter houlsby": {"kind": "adapter", "style": "houlsby", "size": 64},
    "adapter pfeiffer": {"kind": "adapter", "style": "pfeiffer", "size": 64},
    "prefix_layer": {"kind": "prefix_layer", "length": 20},
    "prefix_embed": {"kind": "prefix_embed", "prefix": 20},
    "prompt": {"kind": "prompt", "length": 20},
    "bitfit": {"kind": "bitfit"},
    "ia3": {"kind": "ia3"},
    "top_layers": {"kind": "top_layers", "layers": 2},
    "fpt": {"kind": "fpt"},
    "linear_probe": {"kind": "linear_probe"},
    "subspace": {"kind": "subspace", "dimension": 1000},
}
# what is a change of weights and biases, and can be merged
MERGED = ("lora all maps", "lora q v", "dora q v", "pissa q v", "bitfit", "ia3", "subspace")


def main() -> None:
    """Measures, and prints a table or one JSON document."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result, indent=1) if options.json else table(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names of the table")
    parser.add_argument("--lengths", default="mixed", choices=LENGTHS)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, or `tiny`")
    parser.add_argument("--data", default="alpaca-demo")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of blocks; one more warms up")
    parser.add_argument("--block", type=int, default=1, help="steps in a turn")
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of answers; 0 leaves them out")
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are read")
    parser.add_argument("--tokens", type=int, default=8, help="tokens that are written")
    parser.add_argument("--skip-tensors", action="store_true", help="without counting live tensors")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steps, memory and answers of all methods."""
    names = [name.strip() for name in options.methods.split(",")]
    blocks = options.pairs + 1
    settings: dict[str, Any] = {
        "folder": str(folder), "threads": options.threads, "model": options.model, "data": options.data,
        "max_length": 4096, "steps": blocks * options.block, "rows": LENGTHS[options.lengths].rows, "prefix": 0,
        "lengths": options.lengths, "micro_tokens": options.micro_tokens, "lr": 1e-5, "method": METHODS[FULL],
        "precision": options.precision, "variant": options.precision,
    }  # fmt: skip
    settings |= prepared(settings, folder)
    found = steps_of([name for name in names if name != FULL], settings, options, folder)
    answers = answers_of(names, settings["model_folder"], options) if options.rounds else {}
    for name, way in found.items():
        keys = {"beside": name, "merged": f"{name} merged"}
        way["answers"] = {how: answers[key] for how, key in keys.items() if key in answers}
    kept = {k: settings[k] for k in ("data", "lengths", "precision", "rows", "micro_tokens")} | {"model": options.model}
    return {"methods": found, "base": answers, "machine": machine(options.threads), "settings": kept}


def steps_of(
    names: list[str], settings: dict[str, Any], options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Any]]:
    """Times and memory of each method in turns with full tuning, which lives on from one to the next."""
    blocks, size = options.pairs + 1, options.block
    each = list(range(blocks * size))
    use = list(islice(cycle(each), len(each) * max(1, len(names))))
    full = Worker("ours.py", settings | {"use": use}, folder).wait()
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        say(name)
        mine = settings | {"method": METHODS[name], "use": each}
        try:
            worker = Worker("ours.py", mine, folder).wait()
        except EndedEarlyError as error:
            say(str(error))
            found[name] = {"failed": str(error).strip().splitlines()[-1][:120]}
            continue
        pairs = []
        for turn in range(blocks):
            both = {}
            for side in (full, worker)[:: -1 if turn % 2 else 1]:
                both[side] = side.block(size)
            pairs.append((both[full], both[worker]))
        worker.close()
        timed = pairs[1:] or pairs
        found[name] = {
            "time": spread([us["wall_seconds"] / whole["wall_seconds"] for whole, us in timed]),
            "cpu": spread([us["cpu_seconds"] / whole["cpu_seconds"] for whole, us in timed]),
            "milliseconds": 1000 * min(us["wall_seconds"] for _, us in timed) / size,
            **memory(worker, pairs[-1][1]), "trained": worker.ready["trained"],
        }  # fmt: skip
        if FULL not in found:  # its peak after as many steps as the others do
            one = {"time": spread([1.0]), "cpu": spread([1.0]), "trained": full.ready["trained"]}
            found[FULL] = one | memory(full, pairs[-1][0])
    if not options.skip_tensors:
        for name, way in found.items():
            if "failed" not in way:
                say(f"counting tensors: {name}")
                way["tensor_bytes"] = counted(settings | {"method": METHODS[name]}, each[:2], folder)
    full.close()
    return found


def memory(worker: Worker, report: dict[str, Any]) -> dict[str, int]:
    return {"peak_bytes": report["peak_bytes"], "imports_bytes": worker.ready["imports_bytes"]}


def counted(settings: dict[str, Any], use: list[int], folder: Path) -> int:
    """Peak bytes of live tensors over some steps, in a fresh process."""
    worker = Worker("ours.py", settings | {"use": use, "count": True}, folder).wait()
    report = worker.block(len(use))
    worker.close()
    return int(report["tensor_bytes"])


def answers_of(names: list[str], model: str, options: argparse.Namespace) -> dict[str, Any]:
    """How long answers take, beside the base and merged."""
    ways: dict[str, latency.Way] = {"base": (None, False), "base again": (None, False)}
    for name in names:
        if name != FULL:
            ways[name] = (METHODS[name], False)
        if name in MERGED:
            ways[f"{name} merged"] = (METHODS[name], True)
    say("answers")
    settings = argparse.Namespace(**vars(options))
    settings.model = model
    return dict(latency.measure(settings, ways)["ways"])


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    settings, found = result["settings"], result["methods"]
    lines = [
        described(result["machine"]),
        f"{settings['model']}, {settings['precision']}, lengths {settings['lengths']}, {settings['rows']} rows a step",
        "",
        "| | numbers that train | step, of full | by CPU seconds | peak, resident | without imports, of full "
        "| peak of tensors, of full | reading, over the base | merged | writing, over the base | merged |",
        "|" + "---|" * 11,
    ]
    full = found.get(FULL, {})
    for name, way in found.items():
        if "failed" in way:
            lines.append(f"| {name} | {way['failed']} |" + " |" * 9)
            continue
        net = [each["peak_bytes"] - each["imports_bytes"] for each in (way, full)]
        cells = [name, f"{way['trained']:,}", told(way["time"]), told(way["cpu"]), f"{way['peak_bytes'] / 1e6:,.0f} MB"]
        cells.append(f"{net[0] / net[1]:.2f}")
        tensors = way.get("tensor_bytes")
        cells.append(f"{tensors / 1e6:,.0f} MB, {tensors / full['tensor_bytes']:.2f}" if tensors else "")
        for kind in ("read", "write"):
            for how in ("beside", "merged"):
                answer = way["answers"].get(how)
                cells.append(f"{answer[kind]['processor']['ratio']:.2f}" if answer else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
