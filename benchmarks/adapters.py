"""Rows with adapters of their own against peft's adapter_names: python benchmarks/adapters.py [--json]

As many LoRA adapters as rows of a batch, one a row, on all linear maps; the same factors and real prompts of uneven
length on both sides. `forward` is the logits after each prompt, `write` greedy writing after all of them. In one
process in turns, as benchmarks/generate.py; in fp32 both sides have to write the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.generate import agreement, continued, prompts_of, say, summary, timed  # noqa: E402

MAPS = ("q", "k", "v", "o", "gate", "up", "down")


def main() -> None:
    """Measures, and prints a table or one JSON document."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    result = measure(options)
    print(json.dumps(result, indent=1) if options.json else table(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, or folder")
    parser.add_argument("--data", default="alpaca-demo:test", help="whose prompts are continued")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--adapters", type=int, default=32, help="and rows")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="written after a prompt at most")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; one more warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All precisions."""
    import torch

    from benchmarks.sft import machine

    torch.set_num_threads(options.threads)
    cases = [case for precision in options.precisions.split(",") for case in Bench(options, precision).cases()]
    settings = {name: getattr(options, name) for name in ("model", "data", "adapters", "rank", "tokens", "rounds")}
    return {**settings, "threads": options.threads, "machine": machine(options.threads), "cases": cases}


class Bench:
    """One precision: a model with adapters for each side, and prompts."""

    def __init__(self, options: argparse.Namespace, precision: Any) -> None:
        from tunesmith.models.load import load
        from tunesmith.models.route import Route

        self.options, self.precision = options, precision
        self.names = [f"a{number}" for number in range(options.adapters)]
        self.loaded = load(options.model, dtype=precision)
        self.prompts, self.stops = prompts_of(self.loaded, options.data)
        self.prompts = sorted(self.prompts[: options.adapters], key=len)
        self.route = Route.of_rows(*self.names)
        factors = self._attach()
        self.theirs = theirs(load(options.model, dtype=precision).model, self.names, options.rank, factors)

    def _attach(self) -> dict[str, Any]:
        """Our adapters, none of them at its start; their factors by peft's names."""
        import torch

        from tunesmith.adapt.lora import LoRA

        found: dict[str, Any] = {}
        draw = torch.Generator().manual_seed(0)
        for number, name in enumerate(self.names):
            adapter = LoRA(rank=self.options.rank, targets=MAPS).attach(self.loaded, name, seed=number)
            for port, _, insert in adapter.inserts():
                insert["B"].data = 0.02 * torch.randn(insert["B"].shape, generator=draw)
                found |= {f"base_model.model.{port.path}.lora_{part}.{name}.weight": insert[part] for part in "AB"}
        return found

    def cases(self) -> list[dict[str, Any]]:
        """Reading and writing."""
        read = self._case("forward", self._forward, self._their_forward, sum(map(len, self.prompts)))
        write = self._case("write", self._write, self._their_write, None)
        return [read, write]

    def _case(self, kind: str, ours: Callable[[], Any], other: Callable[[], Any], tokens: int | None) -> dict[str, Any]:
        sides, told, rounds = {"tunesmith": ours, "peft": other}, {}, []
        for turn in range(self.options.rounds + 1):
            found = {}
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                told[name], found[name] = timed(sides[name])
            if turn:
                rounds.append(found)
            say(f"{self.precision} {kind} round {turn}: seconds {found}")
        if tokens is None:
            counts = {name: sum(map(len, ids)) for name, ids in told.items()}
            same: Any = agreement(*told.values())
            assert self.precision != "fp32" or same["rows"] == 1, "the sides do not write the same"
        else:
            counts = dict.fromkeys(sides, tokens)
            mine, other_ = told.values()
            same = {"relative_difference": float((mine - other_).norm() / other_.norm())}
            assert self.precision != "fp32" or same["relative_difference"] < 1e-4, same
        return {"precision": self.precision, "kind": kind, "same": same, **summary(rounds, counts)}

    def _forward(self) -> Any:
        """Logits after each prompt."""
        import torch

        from tunesmith.data.batch import to_batch
        from tunesmith.data.encode import Example
        from tunesmith.models.policy import Policy

        rows = [Example(ids, [False] * len(ids), "row", 0) for ids in self.prompts]
        ends = torch.tensor(list(map(len, self.prompts))).cumsum(0) - 1
        with torch.no_grad():
            return Policy(self.loaded, self.route).logits(to_batch(rows), ends)

    def _their_forward(self) -> Any:
        import torch

        width = max(map(len, self.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in self.prompts])
        seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        with torch.no_grad():
            told = self.theirs(
                input_ids=ids, attention_mask=seen, adapter_names=self.names, logits_to_keep=1, use_cache=False
            )
        return told.logits[:, -1].float()

    def _write(self) -> list[list[int]]:
        from tunesmith.models.generate import generate

        told = generate(
            self.loaded, self.route, self.prompts, max_new_tokens=self.options.tokens, stop_ids=self.stops,
            batch_size=len(self.names),
        )  # fmt: skip
        return [one.ids for one in told]

    def _their_write(self) -> list[list[int]]:
        return continued(
            self.theirs, self.prompts, self.stops, self.options.tokens, "dynamic", adapter_names=self.names
        )


def theirs(model: Any, names: list[str], rank: int, factors: dict[str, Any]) -> Any:
    """peft's adapters with these factors on a model."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    found = peft.get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        found.add_adapter(name, config, autocast_adapter_dtype=False)
    parameters = dict(found.named_parameters())
    held = {name for name in parameters if ".lora_" in name}
    assert held == set(factors), sorted(held ^ set(factors))[:4]
    for name, factor in factors.items():
        parameters[name].data.copy_(factor.data)
    model.set_attn_implementation("sdpa")
    return found.eval()


def table(result: dict[str, Any]) -> str:
    """The same for people, in Markdown."""
    lines = [
        f"{result['model']}, {result['adapters']} adapters of rank {result['rank']}, one a row, prompts of "
        f"{result['data']}, at most {result['tokens']} tokens, {result['threads']} thread(s), median of "
        f"{result['rounds']} rounds; {result['machine']['cpu']}",
        "",
        "| precision | | tunesmith, tokens/s | peft | ratio | by processor | the same |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        wall, cpu = case["wall"], case["processor"]
        name, same = next(iter(case["same"].items()))
        lines.append(
            f"| {case['precision']} | {case['kind']} | {wall['tunesmith']} | {wall['peft']} "
            f"| {wall['ratio']:.2f} ({wall['low']:.2f} to {wall['high']:.2f}) "
            f"| {cpu['ratio']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f}) | {name.replace('_', ' ')} {same:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
