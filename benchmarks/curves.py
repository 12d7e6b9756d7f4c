"""Whether we learn as much: python benchmarks/curves.py [--steps 200 --seeds 3] [--json]

The same rows in the same order for everybody; seeds differ in the factors that LoRA starts from, so that what separates
two seeds is the noise of training, and what separates two sides at one seed is their arithmetic. Each run is a process
of its own, ours in bfloat16 and in float32, trl in its bfloat16 autocast, and is kept as SIDE-SEED.json under `--out`;
what is there is not run again. `gap` is the mean difference of two sides' losses over the last quarter of the steps,
seed by seed; `noise` is how far the seeds of one side are from one another over the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import LENGTHS
from benchmarks.sft import TASKS, method_of
from benchmarks.workers import Worker, described, machine, prepared, say

# a side to its script and variant
SIDES = {
    "ours bf16": ("ours.py", "bf16"),
    "ours fp32": ("ours.py", "fp32"),
    "trl autocast": ("theirs.py", "one-row"),
    "trl fp32": ("theirs.py", "one-row-fp32"),
}
PAIRS = (("ours bf16", "ours fp32"), ("trl autocast", "ours fp32"), ("ours bf16", "trl autocast"))
BLOCK = 10  # steps after which progress is told

Curves = dict[str, list[list[float]]]  # of each side, by seed


def main() -> None:
    """Runs what is missing, and prints a table or one JSON document."""
    options = parse()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    sides = [side.strip() for side in options.sides.split(",")]
    run_all(options, folder, sides)
    curves = {side: [losses(folder, side, seed) for seed in range(options.seeds)] for side in sides}
    result = summary(curves) | {"machine": machine(options.threads), "settings": settings_of(options)}
    (folder / "summary.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result | {"curves": curves}, indent=1) if options.json else table(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", default="ours bf16,ours fp32,trl autocast", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--task", default="lora", choices=("lora", "lora-qv"))
    parser.add_argument("--lengths", default="real", choices=("real", *LENGTHS), help="of rows; see rows.py")
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, or `tiny`")
    parser.add_argument("--data", default="alpaca-demo")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", default="runs/benchmark-curves", help="a folder for one set of settings")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    assert options.task in TASKS
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What workers are told."""
    return {
        "threads": options.threads, "model": options.model, "data": options.data, "max_length": options.max_length,
        "steps": options.steps, "rows": options.rows, "prefix": 0, "lengths": options.lengths, "micro_tokens": 1024,
        "lr": options.lr, "method": method_of(options), "precision": "bf16", "seeds": list(range(options.seeds)),
    }  # fmt: skip


def run_all(options: argparse.Namespace, folder: Path, sides: list[str]) -> None:
    """Every run that is not there yet. Raises SystemExit where the folder holds other settings."""
    settings = settings_of(options)
    # the number of threads and of seeds change no curve
    kept = {key: value for key, value in settings.items() if key not in ("threads", "seeds")}
    known = folder / "settings.json"
    if known.exists() and json.loads(known.read_text()) != kept:
        raise SystemExit(f"{folder} holds runs of other settings; give another --out")
    known.write_text(json.dumps(kept))
    missing = [
        (side, seed) for seed in range(options.seeds) for side in sides if not path_of(folder, side, seed).exists()
    ]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as work:
        settings |= {"folder": work}
        settings |= prepared(settings, Path(work))
        for side, seed in missing:
            run(settings | {"seed": seed}, side, path_of(folder, side, seed))


def run(settings: dict[str, Any], side: str, path: Path) -> None:
    """One run, kept when it is whole."""
    script, variant = SIDES[side]
    settings = settings | {"variant": variant, "use": list(range(settings["steps"]))}
    worker = Worker(script, settings, Path(settings["folder"])).wait()
    found: list[dict[str, Any]] = []
    seconds = 0.0
    while len(found) < settings["steps"]:
        report = worker.block(min(BLOCK, settings["steps"] - len(found)))
        found += report["steps"]
        seconds += report["wall_seconds"]
        say(f"{side}, seed {settings['seed']}: step {len(found)}, loss {found[-1]['loss']:.4f}, {seconds:.0f} s")
    worker.close()
    document = {"side": side, "seed": settings["seed"], "losses": [step["loss"] for step in found], "seconds": seconds}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document | {"what": worker.ready["what"]}))
    part.replace(path)


def path_of(folder: Path, side: str, seed: int) -> Path:
    return folder / f"{side.replace(' ', '-')}-{seed}.json"


def losses(folder: Path, side: str, seed: int) -> list[float]:
    """The curve of a run."""
    return list(json.loads(path_of(folder, side, seed).read_text())["losses"])


def summary(curves: Curves) -> dict[str, Any]:
    """Every side's mean loss and noise, and the gaps of the pairs."""
    tails = {side: [tail(curve) for curve in found] for side, found in curves.items()}
    means = {side: [statistics.fmean(each) for each in found] for side, found in tails.items()}
    noises = {side: noise(found) for side, found in tails.items()}
    found: dict[str, Any] = {
        "sides": {
            side: {
                "first": statistics.fmean(curve[0] for curve in curves[side]),
                "last_quarter": statistics.fmean(values),
                "by_seed": values,
                "noise": noises[side],
                "quarters": [statistics.fmean(quarter(curve, at) for curve in curves[side]) for at in range(4)],
            }
            for side, values in means.items()
        },
        "pairs": {},
    }
    for one, other in PAIRS:
        if one in means and other in means:
            gaps = [a - b for a, b in zip(means[one], means[other], strict=True)]
            within = max(noises[one], noises[other])
            found["pairs"][f"{one} - {other}"] = {
                "gap": statistics.fmean(gaps), "by_seed": gaps, "noise": within,
                "within_noise": abs(statistics.fmean(gaps)) <= within,
            }  # fmt: skip
    return found


def tail(curve: list[float]) -> list[float]:
    """The last quarter."""
    return curve[-max(1, len(curve) // 4) :]


def quarter(curve: list[float], at: int) -> float:
    """Mean of one quarter of a curve."""
    edges = [len(curve) * part // 4 for part in range(5)]
    return statistics.fmean(curve[edges[at] : max(edges[at] + 1, edges[at + 1])])


def noise(found: list[list[float]]) -> float:
    """Of seeds on the same rows: the mean distance of two of their means; 0 of a single one."""
    means = [statistics.fmean(each) for each in found]
    return statistics.fmean(abs(a - b) for a, b in combinations(means, 2)) if len(means) > 1 else 0.0


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    settings = result["settings"]
    lines = [
        described(result["machine"]),
        f"{settings['model']}, {settings['method']}, lengths {settings['lengths']}, {settings['steps']} steps of "
        f"{settings['rows']} rows, {len(settings['seeds'])} seeds",
        "",
        "| | first loss | by quarters of the run | last quarter, by seed | noise of seeds |",
        "|---|---|---|---|---|",
    ]
    for side, found in result["sides"].items():
        quarters, seeds = ([f"{value:.4f}" for value in found[key]] for key in ("quarters", "by_seed"))
        lines.append(
            f"| {side} | {found['first']:.4f} | {' '.join(quarters)} | {' '.join(seeds)} | {found['noise']:.5f} |"
        )
    lines += ["", "| pair | gap in the last quarter | by seed | noise | |", "|---|---|---|---|---|"]
    for pair, found in result["pairs"].items():
        seeds = [f"{value:+.5f}" for value in found["by_seed"]]
        verdict = "within noise" if found["within_noise"] else "more than noise"
        lines.append(f"| {pair} | {found['gap']:+.5f} | {' '.join(seeds)} | {found['noise']:.5f} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
