"""GRPO against trl's GRPOTrainer: python benchmarks/grpo.py PROMPTS.jsonl [--json]

The same prompts, completions of a prompt, limit, temperature, LoRA, learning rate and penalty, bf16, one thread; the
reward is the length of a completion on both sides. trl writes with transformers' generate. The sides take turns as
processes, a few updates each; compared are seconds of processor time of whole updates behind the first, and tokens
written a second of it, so that a busy machine does not decide.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
RATE, PENALTY = 1e-4, 0.04


def main() -> None:
    """Measures, and prints a line a side or one JSON document."""
    options = parse()
    if options.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](options)))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for turn in range(options.turns):
        for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
            found[side] += started(side)
    result = {side: summary(steps) for side, steps in found.items()}
    ratios = {name: result["ours"][name] / result["theirs"][name] for name in result["ours"]}
    told = {**result, "ratio": ratios, "updates": found}
    print(json.dumps(told, indent=1) if options.json else "\n".join(f"{k}: {told[k]}" for k in (*result, "ratio")))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="JSON lines with `prompt`")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--updates", type=int, default=3, help="of a turn; the first is not counted")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="prompts of an update")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def started(side: str) -> list[dict[str, float]]:
    """The updates of one side, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    told = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    steps: list[dict[str, float]] = json.loads(told.stdout.splitlines()[-1])
    return steps[1:]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of an update, and tokens written a second."""
    speeds = [step["tokens"] / step["writing"] for step in steps]
    return {
        "update_cpu_seconds": statistics.median(step["update"] for step in steps),
        "written_tokens_per_cpu_second": statistics.median(speeds),
    }


def ours(options: argparse.Namespace) -> list[dict[str, float]]:
    """A run of tunesmith, from its log."""
    from tunesmith.config import build_config
    from tunesmith.run import run

    with tempfile.TemporaryDirectory() as held:
        reward = Path(held) / "reward.py"
        reward.write_text("def length(prompt, completion, row):\n    return len(completion) / 100\n")
        objective = {
            "kind": "grpo", "reward": f"{reward}:length", "group": options.group, "kl": PENALTY,
            "max_new_tokens": options.tokens,
        }  # fmt: skip
        train = {"steps": options.updates, "rows_per_step": options.rows, "micro_batch_rows": options.rows, "lr": RATE}
        config = build_config({
            "model": options.model, "data": {"train": options.prompts, "template": "plain"},
            "method": {"kind": "lora", "rank": 16, "alpha": 32, "targets": list(MAPS)}, "objective": objective,
            "train": {**train, "schedule": "constant", "warmup": 0.0}, "precision": {"compute": "bf16"},
            "log": [], "out": f"{held}/run",
        })  # fmt: skip
        lines = (run(config) / "metrics.jsonl").read_text().splitlines()
    return [
        {"update": step["cpu_seconds"], "writing": step["writing_cpu_seconds"], "tokens": step["supervised_tokens"]}
        for step in map(json.loads, lines)
    ]


def theirs(options: argparse.Namespace) -> list[dict[str, float]]:
    """A run of trl, its updates timed by a callback and its writing around `_generate`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tunesmith.models.load import load
    from tunesmith.models.source import resolve

    torch.set_num_threads(1)
    steps: list[dict[str, float]] = []

    class Timed(TrainerCallback):
        def on_step_end(self, *args: Any, **settings: Any) -> None:
            steps.append({"update": time.process_time() - began[0], **written})
            began[0] = time.process_time()

    class Watched(GRPOTrainer):
        def _generate(self, prompts: Any, *args: Any, **settings: Any) -> Any:
            start = time.process_time()
            found = super()._generate(prompts, *args, **settings)
            written.update(writing=time.process_time() - start, tokens=sum(map(len, found[1])))
            return found

    def scores(completions: list[str], **more: Any) -> list[float | None]:
        return [len(text) / 100 for text in completions]

    with tempfile.TemporaryDirectory() as held:
        batch = options.rows * options.group
        settings = GRPOConfig(
            output_dir=held, per_device_train_batch_size=batch, num_generations=options.group,
            max_completion_length=options.tokens, beta=PENALTY, temperature=1.0, learning_rate=RATE,
            lr_scheduler_type="constant", max_steps=options.updates, steps_per_generation=1, bf16=True, use_cpu=True,
            gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1000,
        )  # fmt: skip
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rows = [json.loads(line)["prompt"] for line in Path(options.prompts).read_text().splitlines()]
        trainer = Watched(
            model=load(options.model, dtype="bf16").model,
            reward_funcs=scores,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=AutoTokenizer.from_pretrained(resolve(options.model)),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=names),
            callbacks=[Timed()],
        )
        written: dict[str, float] = {}
        began = [time.process_time()]
        trainer.train()
    return steps


if __name__ == "__main__":
    main()
