"""What an adapter costs when a model answers: python benchmarks/latency.py [--json]

The base, a LoRA merged into it, the same LoRA beside it, and bottleneck adapters, in one process in turns: every round
runs each way once, in alternating order, and a ratio compares a way with the base of its own round. The base runs twice
a round: the ratio of the two is the noise. `read` is a prompt in one pass, `write` a token with keys and values kept.
Wall time and processor time, because another program on the machine slows the first alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
Way = tuple[dict[str, Any] | None, bool]  # a method, and whether it is merged
# the second base shows the noise
WAYS: dict[str, Way] = {
    "base": (None, False),
    "base again": (None, False),
    "lora merged": ({"kind": "lora", "rank": 8, "targets": MAPS}, True),
    "lora q v": ({"kind": "lora", "rank": 8}, False),
    "lora all maps": ({"kind": "lora", "rank": 8, "targets": MAPS}, False),
    "dora q v": ({"kind": "lora", "rank": 8, "dora": True}, False),
    "adapter houlsby 64": ({"kind": "adapter", "style": "houlsby", "size": 64}, False),
    "adapter pfeiffer 64": ({"kind": "adapter", "style": "pfeiffer", "size": 64}, False),
}

Seconds = tuple[float, float]  # wall, processor


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
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds; one more warms up")
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are read")
    parser.add_argument("--tokens", type=int, default=8, help="tokens that are written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace, ways: dict[str, Way] = WAYS) -> dict[str, Any]:
    """All rounds, and what they come to. Of ways, one is `base`."""
    import torch

    from tunesmith.models.load import load

    torch.set_num_threads(options.threads)
    loaded = load(options.model, dtype=options.precision)
    rounds: list[dict[str, dict[str, Seconds]]] = []
    sizes: dict[str, int] = {}
    for turn in range(options.rounds + 1):
        found = {}
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            with on(loaded, name, ways[name], sizes) as route:
                todo = works(loaded, route, options)
                todo["write"]()  # weights that were made a moment ago are slow to touch
                found[name] = {kind: timed(work) for kind, work in todo.items()}
        if turn:
            rounds.append(found)
    settings = {"model": options.model, "precision": options.precision, "threads": options.threads}
    settings |= {"prompt_tokens": options.prompt, "written_tokens": options.tokens, "rounds": options.rounds}
    return {**settings, "ways": {name: {"parameters": sizes[name], **summary(rounds, name, options)} for name in ways}}


@contextmanager
def on(loaded: Any, name: str, way: Way, sizes: dict[str, int]) -> Iterator[Any]:
    """The model one way, as a context; the base is free of ports."""
    import torch

    from tunesmith.adapt.merge import merge, unmerge
    from tunesmith.adapt.methods import METHODS
    from tunesmith.models.route import BASE

    settings, is_merged = way
    if settings is None:
        sizes[name] = 0
        yield BASE
        return
    adapter = METHODS.load(settings["kind"])(**settings).attach(loaded)
    sizes[name] = sum(value.numel() for value in adapter.parameters.values())
    with torch.no_grad():
        for value in adapter.parameters.values():
            value.add_(torch.randn_like(value), alpha=0.01)
    if is_merged:
        merge(loaded, adapter.name)
    yield adapter.route
    if is_merged:
        unmerge(loaded)
    adapter.detach()


def works(loaded: Any, route: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed: reading a prompt, and writing after a short one."""
    from tunesmith.models.generate import generate

    prompt = [10 + index % 50 for index in range(options.prompt)]

    def write(ids: list[int], count: int) -> Callable[[], Any]:
        return lambda: generate(loaded, route, [ids], max_new_tokens=count, stop_ids=set())

    return {"read": write(prompt, 1), "write": write(prompt[:4], options.tokens)}


def timed(work: Callable[[], Any]) -> Seconds:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(rounds: list[dict[str, dict[str, Seconds]]], name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of each kind of work: milliseconds, and the ratio to the base with its quartiles, by wall and by processor."""
    found: dict[str, Any] = {}
    for kind, units in (("read", 1), ("write", options.tokens)):
        millis = 1000 * statistics.median(each[name][kind][0] for each in rounds) / units
        found[kind] = {"milliseconds": round(millis, 2)}
        for clock, at in (("wall", 0), ("processor", 1)):
            ratios = [each[name][kind][at] / each["base"][kind][at] for each in rounds]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            found[kind][clock] = {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
    return found


def table(result: dict[str, Any]) -> str:
    """The same for people, in Markdown."""
    lines = [
        f"{result['model']}, {result['precision']}, {result['threads']} thread(s), median of {result['rounds']} rounds",
        "",
        f"| | parameters | reading {result['prompt_tokens']} tokens | over the base, by processor | writing a token "
        "| over the base, by processor |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in result["ways"].items():
        cells = [name, f"{way['parameters']:,}"]
        for kind in ("read", "write"):
            ratio = way[kind]["processor"]
            cells.append(f"{way[kind]['milliseconds']:.1f} ms")
            cells.append(f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
