"""A sentiment classifier trained in fp32, bf16 and fp16: python benchmarks/formats.py TRAIN.jsonl DEV.jsonl

The lecture's table (CS224N, mixed precision): accuracy, time and memory of each format, over seeds. Rows are labelled
ones, as `scripts/glue.py` makes them of SST-2. Every run is `tunesmith tune` in a process of its own, on one thread;
time is that of its processor in updates, memory what the process took at most and what the plan says of its tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.seeds import over_seeds

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("fp32", "bf16", "fp16")


def main() -> None:
    """Runs every format with every seed and prints a row for each format."""
    parser = over_seeds(__doc__, model="minilm", steps=40, rows=16, judged=400, lr=3e-4)
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("--method", default="full")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    options = parser.parse_args()
    print("| compute | accuracy, each seed | mean | processor seconds a step | tensors (plan) | peak of the process |")
    print("|---|---|---|---|---|---|", flush=True)
    for compute in options.formats:
        runs = [tuned(options, compute, seed) for seed in range(options.seeds)]
        scores = [run["accuracy"] for run in runs]
        seconds = statistics.median(run["seconds"] for run in runs)
        planned, peak = (max(run[key] for run in runs) / 1e6 for key in ("planned", "peak"))
        print(
            f"| {compute} | {', '.join(f'{score:.1f}' for score in scores)} | {statistics.mean(scores):.1f} % "
            f"| {seconds:.2f} | {planned:,.0f} MB | {peak:,.0f} MB |",
            flush=True,
        )


def tuned(options: argparse.Namespace, compute: str, seed: int) -> dict[str, Any]:
    """What a run came to: accuracy, processor seconds of its median step, bytes planned, and bytes of the process."""
    with tempfile.TemporaryDirectory() as place:
        config = {
            "model": options.model,
            "data": {"train": str(options.train), "eval": f"{options.dev}#{options.judged}", "max_length": 64},
            "method": options.method,
            "objective": {"kind": "predict", "problem": "classification"},
            "train": {
                "steps": options.steps, "rows_per_step": options.rows, "micro_batch_rows": options.rows,
                "lr": options.lr, "schedule": "linear", "warmup": 0.1, "save_every": 10**6, "seed": seed,
            },
            "precision": {"compute": compute},
            "evaluate": {"metrics": ["accuracy"]},
            "log": [],
            "out": f"{place}/run",
        }  # fmt: skip
        path = Path(place) / "config.yaml"
        path.write_text(json.dumps(config), "utf-8")
        command = [sys.executable, "-m", "tunesmith", "tune", str(path)]
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        found = {name: json.loads((Path(place) / "run" / name).read_text()) for name in ("eval.json", "plan.json")}
        records = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": found["eval.json"]["models"][-1]["metrics"]["accuracy"]["value"],
        "seconds": statistics.median(record["cpu_seconds"] for record in records),
        "planned": found["plan.json"]["memory"]["peak_bytes"],
        "peak": records[-1]["peak_bytes"],
    }


if __name__ == "__main__":
    main()
