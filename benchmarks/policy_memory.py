"""Peak memory of ppo and grpo beside sft: python benchmarks/policy_memory.py [--rows 32] [--prompt 96] [--answer 32]

The same model, LoRA, micro-batch and length: prompts of so many tokens, and answers of so many, in sft those of the
data, in the others the model's own. Each is an ordinary run in a fresh process, once as it is, for its resident memory,
and once with its live tensors counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "grpo": {"group": 8, "kl": 0.04},
    "ppo": {"epochs": 2, "minibatches": 2, "kl": 0.05},
}


def main() -> None:
    """Measures, and prints a row a kind or one JSON document."""
    options = parse()
    if options.kind:
        print(json.dumps(peak(options)))
        return
    found = {kind: started(kind) | {"tensor_bytes": started(kind, "--count")["tensor_bytes"]} for kind in KINDS}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("| | tokens of the fullest micro-batch | live tensors | of sft | resident | of sft |\n|" + "---|" * 6)
    for kind, one in found.items():
        sizes = [(one[name], found["sft"][name]) for name in ("tensor_bytes", "resident_bytes")]
        cells = [f"{bytes_ / 1e9:.3f} GB | {bytes_ / sft:.2f}" for bytes_, sft in sizes]
        print(f"| {kind} | {one['tokens']:,} | {' | '.join(cells)} |")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32, help="completions of a micro-batch and of an update")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--kind", choices=tuple(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def started(kind: str, *more: str) -> dict[str, int]:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, *more]
    told = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    found: dict[str, int] = json.loads(told.stdout.splitlines()[-1])
    return found


def peak(options: argparse.Namespace) -> dict[str, int]:
    """What two updates of a kind have taken."""
    from tunesmith.config import build_config
    from tunesmith.run import run
    from tunesmith.train.log import peak_bytes

    with tempfile.TemporaryDirectory() as held, counted() if options.count else nullcontext() as live:
        config = build_config(settings(options, Path(held)))
        lines = (run(config, before=False) / "metrics.jsonl").read_text().splitlines()
    tokens = max(int(step["tokens"]) for step in map(json.loads, lines))
    tensors = {} if live is None else {"tensor_bytes": int(live.peak_all_bytes)}
    return {"tokens": tokens, "resident_bytes": peak_bytes(), **tensors}


def counted() -> Any:
    """Counts live tensors, and packed weights, which have no storage that torch could show, with them."""
    import torch
    from torch.utils._pytree import tree_leaves

    from tunesmith.plan.trace import LiveStorages

    class Counted(LiveStorages):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not any(is_packed(leaf) for leaf in tree_leaves((args, kwargs))) and "mkldnn" not in str(func):
                return super().__torch_dispatch__(func, types, args, kwargs)
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if is_packed(leaf):
                    size = leaf.numel() * leaf.element_size()
                    self.now_bytes += size
                    self._see()
                    weakref.finalize(leaf, self._gone, size)
                elif isinstance(leaf, torch.Tensor):
                    self._hold(leaf)
            return out

        def _gone(self, size: int) -> None:
            self.now_bytes -= size

    def is_packed(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.layout is torch._mkldnn  # type: ignore[attr-defined]

    return Counted()


def settings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The configuration of a run; its rows differ from their first word on, so that nothing of them is shared."""
    count = 4 * options.rows
    rows = [
        {"prompt": f"{number:03}" + " a" * (options.prompt - 3), "completion": " b" * (options.answer - 1)}
        for number in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"kind": options.kind, **KINDS[options.kind]}
    if options.kind != "sft":
        (folder / "reward.py").write_text("def length(prompt, completion, row):\n    return len(completion) / 100\n")
        objective |= {"reward": f"{folder}/reward.py:length", "max_new_tokens": options.answer}
    prompts = options.rows // objective.get("group", 1)
    return {
        "model": options.model,
        "data": {"train": str(folder / "rows.jsonl"), "template": "plain"},
        "method": {"kind": "lora", "rank": 16, "alpha": 32, "targets": ["q", "k", "v", "o", "gate", "up", "down"]},
        "objective": objective,
        "train": {"steps": 2, "rows_per_step": prompts, "micro_batch_rows": prompts, "lr": 1e-4},
        "precision": {"compute": "bf16"},
        "log": [],
        "out": f"{folder}/run",
    }


if __name__ == "__main__":
    main()
