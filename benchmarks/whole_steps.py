"""Whole training steps on throttled links against the planner: ddp, zero1, zero2, zero3 and a pipeline, two processes.

    python benchmarks/whole_steps.py [--megabits 10 25] [--layouts ddp zero1 zero2 zero3 pipeline] [--json]

Two `tunesmith tune` of one small llama, each in a network namespace of its own (`benchmarks/links.py`). Computing is
calibrated before each layout, in the same minutes: one process alone, with the rows that each of two has, whose least
processor time of a step says how many FLOPs a second the planner is given. A link is fitted on collectives alone, of
up to what a bucket of the model has: long transfers are slower than short ones promise. The planner's step with
nothing hidden is compared with the fastest of the measured ones. The model is small and the links are slow, so that a
busy machine tells something, too. Needs root and iproute2.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.links import fitted, measured, namespaces  # noqa: E402
from tunesmith.config import Config, load_config  # noqa: E402
from tunesmith.plan import links, placed  # noqa: E402
from tunesmith.plan.cluster import Cluster, ClusterSection  # noqa: E402
from tunesmith.plan.layouts import Layout  # noqa: E402
from tunesmith.plan.links import Link  # noqa: E402
from tunesmith.plan.loads import Work  # noqa: E402
from tunesmith.plan.placed import Board, Placed  # noqa: E402
from tunesmith.run.placing import pieces_of_run  # noqa: E402

FITTED_BYTES = 2**22  # the largest buffer of the collectives that a link is fitted on: gradients are 3.6 MB
ROWS, MICRO_ROWS, STEPS = 8, 2, 8  # of a step, of a micro-batch; and steps, the first of which opens connections
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data": 2},
    "zero1": {"data": 2, "shard": "zero1"},
    "zero2": {"data": 2, "shard": "zero2"},
    "zero3": {"data": 2, "shard": "zero3"},
    "pipeline": {"pipeline": 2},
}
CONFIG = f"""
model: model
data: {{train: rows.jsonl, format: text, max_length: 192}}
method: full
train: {{steps: {STEPS}, micro_batch_rows: {MICRO_ROWS}, lr: 1e-3, save_every: 100}}
precision: {{compute: fp32}}
log: []
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        config = load_config(folder / "c.yaml", ["out=plan", f"model={folder / 'model'}", "train.rows_per_step=8"])
        rows = []
        for megabits in options.megabits:
            link = fitted(list(measured(2, megabits, FITTED_BYTES)))[2]
            told(f"{megabits} Mbit/s: {link.bytes_per_second * 8e-6:.2f} fitted, {1e3 * link.seconds:.1f} ms")
            for name in options.layouts:
                rows.append(compared(folder, name, megabits, link, config))
                told(line(rows[-1]))
    report(rows, options.json)


def prepare(folder: Path) -> None:
    """A llama of 0.9 million parameters and rows of the same length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer_folder

    tiny_tokenizer_folder(folder / "model")
    shape = LlamaConfig(
        vocab_size=384, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    texts = [f"{number:03d} " + "abcdefghij klmnopqrs tuvwxyz " * 2 for number in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "c.yaml").write_text(CONFIG)


def tune(folder: Path, out: str, rows: int, layout: dict[str, Any], names: list[str] | None = None) -> dict[str, Any]:
    """The fastest step of a run after the first one, as metrics.jsonl has it: others use the processors, too. Of one
    process it is the one with the least processor time, for which they matter less."""
    words = ["tune", "c.yaml", f"out={out}", f"train.rows_per_step={rows}"]
    words += [f"layout.{key}={value}" for key, value in layout.items()]
    command = [sys.executable, "-m", "tunesmith", *words]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    starts = [(command, common)]
    if names:
        common |= {"WORLD_SIZE": str(len(names)), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29611"}
        common |= {"GLOO_SOCKET_IFNAME": "eth0"}
        starts = [
            (["ip", "netns", "exec", name, *command], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, name in enumerate(names)
        ]
    processes = [
        subprocess.Popen(words, cwd=folder, env=given, stderr=subprocess.PIPE, text=True) for words, given in starts
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(errors))
    records = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    return min(records[1:], key=lambda record: record["step_seconds" if names else "cpu_seconds"])


def compared(folder: Path, name: str, megabits: int, link: Link, config: Config) -> dict[str, Any]:
    """A layout at one speed of its links, measured and predicted."""
    alone = tune(folder, f"{name}-{megabits}-alone", ROWS // 2, {})
    with namespaces(2, megabits) as names:
        found = tune(folder, f"{name}-{megabits}", ROWS, LAYOUTS[name], names)
    work = Work(ROWS, round(alone["tokens"] / alone["rows"]))
    planned = predicted(config, LAYOUTS[name], link, alone["cpu_seconds"], work)
    return {
        "layout": name,
        "megabits": megabits,
        "alone_seconds": alone["cpu_seconds"],
        "sent_bytes": found["sent_bytes"],
        "communication_seconds": found["communication_seconds"],
        "seconds": found["step_seconds"],
        "predicted": planned.exposed_seconds,
        "error": planned.exposed_seconds / found["step_seconds"] - 1,
    }


def predicted(config: Config, layout: dict[str, Any], link: Link, alone_seconds: float, work: Work) -> Placed:
    """The planner's step on two devices that compute as this machine does and are tied by such a link."""
    # gloo makes a reduce-scatter of a whole all-reduce (benchmarks/links.py)
    placed.links.reduce_scatter = lambda link, size, nbytes: 2 * links.all_gather(link, size, nbytes)  # type: ignore[assignment]
    pieces = pieces_of_run(config, "fp32")
    # one process with half of the rows takes what it was seen to take
    once = place(Board(cluster(1, 1.0, link), pieces, Work(work.rows // 2, work.row_tokens), 1, 1, 1), {})
    teraflops = once.seconds / alone_seconds
    sizes = [layout.get(key, 1) for key in ("tensor", "data", "pipeline")]
    return place(Board(cluster(2, teraflops, link), pieces, work, *sizes), layout)


def place(board: Board, layout: dict[str, Any]) -> Placed:
    schedule: Any = "1f1b" if "pipeline" in layout else "none"
    found = board.place(Layout(**layout, schedule=schedule, micro_rows=MICRO_ROWS))
    assert isinstance(found, Placed)
    return found


def cluster(count: int, teraflops: float, link: Link) -> Cluster:
    """Nodes of one device each; memory is no limit."""
    section = {"gb_per_second": link.bytes_per_second / 1e9, "microseconds": 1e6 * link.seconds}
    device = {"name": "cpu", "tflops": teraflops, "memory_gb": 1000, "memory_gb_per_second": 1e6}
    nodes = [{"device": {**device, "within": section, "between": section}, "devices": 1, "count": count}]
    return Cluster(ClusterSection.model_validate({"nodes": nodes, "compute_efficiency": 1.0, "link_efficiency": 1.0}))


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['layout']} | {row['megabits']} | {row['alone_seconds']:.3f} | {row['sent_bytes'] / 1e6:.2f} "
        f"| {row['communication_seconds']:.2f} "
        f"| {row['seconds']:.3f} | {row['predicted']:.3f} | {100 * row['error']:+.1f} % |"
    )


def report(rows: list[dict[str, Any]], as_json: bool) -> None:
    middle = statistics.median(abs(row["error"]) for row in rows)
    if as_json:
        print(json.dumps({"median_error": middle, "load": os.getloadavg()[0], "rows": rows}))
        return
    print("| layout | Mbit/s | alone, s | sent, MB | in collectives, s | step measured, s | predicted, s | error |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, rows)))
    print(f"\nmedian error {100 * middle:.1f} %, load {os.getloadavg()[0]:.1f}")


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
