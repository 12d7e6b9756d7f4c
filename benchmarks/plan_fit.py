"""Whether what `plan --fit` suggests runs, and the next larger does not: python benchmarks/plan_fit.py [--budgets 10]

Each budget is one that the run as it was written does not fit into. The first suggestion with a smaller micro-batch is
run under RLIMIT_DATA, which ends an allocation beyond it; so is the same with a micro-batch twice as large. The limit
counts what a process has reserved, more than it uses, by about as much as a process takes that has just loaded the
model: that is measured once and added to every budget.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
model: minilm
data: {train: ROWS, max_length: 128}
method: {kind: lora, rank: 8}
objective: {kind: predict, problem: classification}
precision: {compute: fp32}
train: {steps: 2, tokens_per_step: 16384, micro_batch_tokens: 16384}
log: []
out: runs/fit
"""
# of reserved memory beyond resident memory, in a process that has loaded the model and made nothing yet
_PROBE = """
import sys
from pathlib import Path
import torch, transformers
from transformers import modeling_utils, tokenization_utils_tokenizers
from tunesmith.models.load import load
load("minilm")
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
print(1024 * (int(fields["VmData"].split()[0]) - int(fields["VmRSS"].split()[0])))
"""


def main() -> None:
    """Tries every budget and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source, right = random.Random(options.seed), 0
    beyond = int(run(["-c", _PROBE]).stdout)
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(ROOT))
        from benchmarks.plan_cases import labelled

        config = Path(folder) / "fit.yaml"
        config.write_text(CONFIG.replace("ROWS", str(labelled(Path(folder)))))
        print("| budget | suggested | runs | next larger | runs |\n|---:|---|---|---|---|")
        for _ in range(options.budgets):
            budget = source.randrange(900_000_000, 1_800_000_000)
            row = tried(config, budget, beyond)
            right += row["runs"] and not row["larger_runs"]
            said = {True: "yes", False: "no"}
            print(
                f"| {budget / 1e6:,.0f} MB | {row['suggested']} | {said[row['runs']]} | {row['larger']} "
                f"| {said[row['larger_runs']]} |",
                flush=True,
            )
    print(f"{right} of {options.budgets} right")


def tried(config: Path, budget: int, beyond: int) -> dict[str, Any]:
    """The suggestion for a budget, and how it and the next larger went."""
    found = json.loads(run(["-m", "tunesmith", "plan", str(config), "--fit", f"{budget}", "--json"]).stdout)["fit"]
    option = next(one for one in found["options"] if "train.micro_batch_tokens" in one["settings"])
    tokens = option["settings"]["train.micro_batch_tokens"]
    others = {key: value for key, value in option["settings"].items() if key != "train.micro_batch_tokens"}
    return {
        "suggested": words({**others, "train.micro_batch_tokens": tokens}),
        "runs": fits(config, {**others, "train.micro_batch_tokens": tokens}, budget + beyond),
        "larger": words({**others, "train.micro_batch_tokens": 2 * tokens}),
        "larger_runs": fits(config, {**others, "train.micro_batch_tokens": 2 * tokens}, budget + beyond),
    }


def words(settings: dict[str, Any]) -> str:
    return " ".join(f"{key.removeprefix('train.')}={value}" for key, value in settings.items())


def fits(config: Path, settings: dict[str, Any], limit: int) -> bool:
    """Whether a run ends well under the limit."""
    with tempfile.TemporaryDirectory() as out:
        given = [f"{key}={value}" for key, value in settings.items()]
        command = ["-m", "tunesmith", "tune", str(config), *given, f"out={out}/run"]
        return run(command, limit).returncode == 0


def run(command: list[str], limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, on one thread."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,
    )


if __name__ == "__main__":
    main()
