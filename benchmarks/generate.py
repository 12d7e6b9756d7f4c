"""Greedy writing against transformers' generate: python benchmarks/generate.py [--json]

Real prompts of uneven length, completions that end unevenly, the same stop tokens and limit on both sides. In one
process in turns: every round each side writes after all prompts once, in alternating order, and a ratio compares the
two sides of one round. transformers gets its prompts sorted by length, so that batches hold little padding, and of its
settings those that are fastest here (attention and cache are tried first). In fp32 the tokens have to be the same; in
bf16 both sides are compared with what is written in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRIED = ("sdpa dynamic", "sdpa static", "eager dynamic")
Written = list[list[int]]


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
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--turns", type=int, default=2, help="prompts of a round, in batches")
    parser.add_argument("--tokens", type=int, default=64, help="written after a prompt at most")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; one more warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", default=",".join(TRIED), help="of transformers, to choose from")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All precisions and batches."""
    import torch

    from benchmarks.sft import machine

    torch.set_num_threads(options.threads)
    cases = []
    for precision in options.precisions.split(","):
        bench = Bench(options, precision)
        cases += [bench.case(int(size)) for size in options.batches.split(",")]
    settings = {name: getattr(options, name) for name in ("model", "data", "tokens", "rounds", "threads")}
    return {**settings, "machine": machine(options.threads), "cases": cases}


class Bench:
    """One precision: a model for each side, and prompts."""

    def __init__(self, options: argparse.Namespace, precision: Any) -> None:
        from tunesmith.models.load import load

        self.options, self.precision = options, precision
        self.loaded = load(options.model, dtype=precision)
        self.theirs = load(options.model, dtype=precision).model
        self.exact = None if precision == "fp32" else load(options.model, dtype="fp32")
        self.prompts, self.stops = prompts_of(self.loaded, options.data)

    def case(self, size: int) -> dict[str, Any]:
        """One batch size: settings, the comparison of what is written, and the rounds."""
        prompts = self.prompts[: size * self.options.turns]
        best = self.best(prompts[:size], size)
        sides: dict[str, Callable[[], Written]] = {
            "tunesmith": lambda: self.ours(prompts, size),
            "transformers": lambda: self.other(prompts, size, best, self.options.tokens),
        }
        rounds, told = [], {}
        for turn in range(self.options.rounds + 1):
            found = {}
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                told[name], found[name] = timed(sides[name])
            if turn:
                rounds.append(found)
            rate = {name: [sum(map(len, told[name])) / seconds for seconds in found[name]] for name in sides}
            say(f"{self.precision} batch {size} round {turn}: tokens/s by wall and by processor {rate}")
        if self.precision == "fp32":
            assert told["tunesmith"] == told["transformers"], "the sides do not write the same"
        lengths = list(map(len, prompts))
        return {
            "precision": self.precision, "batch": size, "prompts": len(prompts), "transformers_settings": best,
            "prompt_tokens": {"mean": statistics.mean(lengths), "least": min(lengths), "most": max(lengths)},
            "written": {name: sum(map(len, ids)) for name, ids in told.items()},
            "stopped": sum(len(ids) < self.options.tokens for ids in told["tunesmith"]),
            "same": agreement(told["tunesmith"], told["transformers"]),
            "as_in_fp32": self.exactness(prompts, told),
            **summary(rounds, {name: sum(map(len, ids)) for name, ids in told.items()}),
        }  # fmt: skip

    def exactness(self, prompts: list[list[int]], told: dict[str, Written]) -> dict[str, dict[str, float]]:
        """How far each side writes what is written in fp32: rounding hides which of two likely tokens is likelier."""
        if self.exact is None:
            return {}
        exact = self.ours(prompts, 8, self.exact)
        return {name: agreement(ids, exact) for name, ids in told.items()}

    def ours(self, prompts: list[list[int]], size: int, loaded: Any = None) -> Written:
        """What tunesmith writes."""
        from tunesmith.models.generate import generate

        told = generate(
            loaded or self.loaded, None, prompts, max_new_tokens=self.options.tokens, stop_ids=self.stops,
            batch_size=size,
        )  # fmt: skip
        return [one.ids for one in told]

    def other(self, prompts: list[list[int]], size: int, setting: str, tokens: int) -> Written:
        """What transformers writes, longest prompts first."""
        attention, cache = setting.split()
        if self.theirs.config._attn_implementation != attention:
            self.theirs.set_attn_implementation(attention)
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            told = continued(self.theirs, [prompts[row] for row in rows], self.stops, tokens, cache)
            found |= dict(zip(rows, told, strict=True))
        return [found[row] for row in range(len(prompts))]

    def best(self, prompts: list[list[int]], size: int) -> str:
        """The fastest settings of transformers for one batch."""
        names = self.options.settings.split(",")
        if len(names) == 1:
            return str(names[0])
        seconds = {}
        for name in names:
            self.other(prompts, size, name, 2)
            seconds[name] = timed(partial(self.other, prompts, size, name, self.options.tokens))[1][1]
        say(f"{self.precision} batch {size}: processor seconds of transformers by setting {seconds}")
        return str(min(seconds, key=lambda name: seconds[name]))


def prompts_of(loaded: Any, data: str) -> tuple[Written, set[int]]:
    """Prompts of a data set as ids in the model's template, and what ends an answer."""
    from tunesmith.data.codec import Codec
    from tunesmith.run.judging import Question

    dataset = Question(data, ()).dataset(data, Codec.open(loaded.folder), "auto")
    dialogues = list(dataset.dialogues(None))
    return [dataset.prompt_ids(one, []) for one in dialogues], set(dataset.template_of(dialogues[0]).stop_ids)


def continued(model: Any, prompts: Written, stops: set[int], tokens: int, cache: str, **more: Any) -> Written:
    """transformers' generate for one batch, padded on the left; without stop tokens."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        told = model.generate(
            input_ids=ids, attention_mask=seen, do_sample=False, max_new_tokens=tokens, pad_token_id=0,
            eos_token_id=sorted(stops) or None, cache_implementation=None if cache == "dynamic" else cache,
            disable_compile=True, **more,
        )  # fmt: skip
    rows = told[:, width:].tolist()
    ends = [next((place for place, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What it answers, and wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - wall, time.process_time() - cpu)


def agreement(ours: Written, theirs: Written) -> dict[str, float]:
    """Rows that are the same, and the share of tokens before the first that differs."""
    pairs = list(zip(ours, theirs, strict=True))
    common = [next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[0])) for pair in pairs]
    tokens = max(1, sum(map(len, theirs)))
    return {"rows": sum(a == b for a, b in pairs) / len(pairs), "tokens": min(1.0, sum(common) / tokens)}


def summary(rounds: list[dict[str, tuple[float, float]]], tokens: dict[str, int]) -> dict[str, Any]:
    """Tokens a second of each side, and the ratio of the two, round by round."""
    found: dict[str, Any] = {}
    for clock, at in (("wall", 0), ("processor", 1)):
        rates = {name: [tokens[name] / each[name][at] for each in rounds] for name in tokens}
        ours, theirs = rates.values()
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        found[clock] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        found[clock] |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def table(result: dict[str, Any]) -> str:
    """The same for people, in Markdown."""
    lines = [
        f"{result['model']}, prompts of {result['data']}, at most {result['tokens']} tokens, {result['threads']} "
        f"thread(s), median of {result['rounds']} rounds; {result['machine']['cpu']}",
        "",
        "| precision | batch | tunesmith, tokens/s | transformers | ratio | by processor | rows alike | as in fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        wall, cpu = case["wall"], case["processor"]
        exact = " / ".join(f"{100 * side['tokens']:.0f} %" for side in case["as_in_fp32"].values())
        lines.append(
            f"| {case['precision']} | {case['batch']} | {wall['tunesmith']} | {wall['transformers']} "
            f"({case['transformers_settings']}) | {wall['ratio']:.2f} ({wall['low']:.2f} to {wall['high']:.2f}) "
            f"| {cpu['ratio']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f}) "
            f"| {100 * case['same']['rows']:.0f} % | {exact} |"
        )
    return "\n".join(lines)


def say(what: str) -> None:
    """Something for people who wait."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
