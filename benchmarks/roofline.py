"""What this machine can do, and the least that a step can cost: python benchmarks/roofline.py [--json]

Measured: matrix products in bfloat16 and float32, square ones and at a model's shapes, and copying, with one thread and
with all; the fastest product is the ceiling. Counted: the multiplications and additions that no exact method can leave
out, and the bytes that have to move. The larger of the two times is the floor of a step. `share of the ceiling`
elsewhere means these FLOPs over the seconds that a step took, over a ceiling measured around it (`turns.ceiling`).

Source of the counts: 2 a product forward, 2 for the gradient of its input, 2 for that of a weight that trains
(Kaplan et al. 2020, arXiv 2001.08361); attention is causal and its backward computes the scores again (5 products
against 2; Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.workers import described, machine
from tunesmith.plan.shape import ModelShape, lora_parameters, read_shape

ALL_MAPS = ("q", "k", "v", "o", "gate", "up", "down")
SQUARES = {f"{size} cubed": (size, size, size) for size in (1024, 2048)}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
# configurations for which no weights are needed
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA
    | {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "smollm2-135m": _LLAMA
    | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "llama-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    | {"tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Work:
    """FLOPs of one update, and the bytes that it moves at least.

    Attributes:
        maps: the linear maps of all blocks, with the gradients that are needed.
        adapters: what low-rank factors add.
        attention: scores and their use, causal.
        head: logits where there is a label.
        spared: the first block's inputs need no gradient where nothing before it trains; the last block's o, gate, up
            and down are needed where there is a label.
        bytes: weights once a direction, what the backward needs written and read once, states of the optimizer.
        tokens: what is computed: a beginning that all rows share counts once.
    """

    maps: float
    adapters: float
    attention: float
    head: float
    spared: float
    bytes: float
    tokens: int

    @property
    def flops(self) -> float:
        return self.maps + self.adapters + self.attention + self.head - self.spared

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor: arithmetic and copying side by side."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def step_work(
    shape: ModelShape,
    lengths: Sequence[int],
    supervised: int,
    *,
    rank: int = 0,
    targets: Sequence[str] = ALL_MAPS,
    prefix: int = 0,
    item_bytes: int = 2,
) -> Work:
    """The least work of an update.

    Args:
        lengths: tokens of each row.
        supervised: tokens that have a label, of all rows.
        rank: of LoRA on `targets` of all blocks; 0 trains everything instead.
        prefix: tokens that all rows begin with.
        item_bytes: of weights and activations.
    """
    width, queries, keys = shape.d_model, shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    tokens = sum(lengths) - prefix * (len(lengths) - 1)
    squares = sum(length**2 for length in lengths) - prefix**2 * (len(lengths) - 1)
    late = queries * width + (3 if shape.gated else 2) * width * shape.d_mlp  # o, gate, up, down of a block
    factors = lora_parameters(shape, rank, targets) if rank else 0
    passes = 4 if rank else 6
    trained = factors or shape.matrix_parameters + shape.head_parameters * (1 if shape.tied else 2)
    first = 2 * width * (queries + 2 * keys) * tokens if rank else 0
    kept = 2 * width + 2 * queries + 2 * keys + 2 * shape.d_mlp + 7 * rank
    return Work(
        maps=passes * shape.matrix_parameters * tokens,
        adapters=6 * factors * tokens,
        attention=7 * shape.n_layers * queries * squares,
        head=passes * shape.head_parameters * supervised,
        spared=first + passes * late * (tokens - supervised),
        bytes=2 * item_bytes * (shape.matrix_parameters + shape.head_parameters)
        + 2 * item_bytes * shape.n_layers * kept * tokens
        + (32 + (0 if rank else item_bytes)) * trained,  # its gradient; weight and two moments, read and written
        tokens=tokens,
    )


def product_shapes(shape: ModelShape, tokens: int) -> dict[str, tuple[int, int, int]]:
    """(rows, outputs, inputs) of the products of a step."""
    queries, keys = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    return {
        "q k v": (tokens, queries + 2 * keys, shape.d_model),
        "o": (tokens, shape.d_model, queries),
        "gate up": (tokens, (2 if shape.gated else 1) * shape.d_mlp, shape.d_model),
        "down": (tokens, shape.d_model, shape.d_mlp),
        "head": (min(128, tokens), shape.vocab, shape.d_model),
    }


def product_rate(rows: int, outputs: int, inputs: int, dtype: str, seconds: float, device: str = "cpu") -> float:
    """FLOP/s of x W': the best that was seen, for a neighbour can only take away."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    x, weight = (torch.randn(count, inputs, device=device).to(kind) for count in (rows, outputs))
    with torch.no_grad():
        return 2.0 * rows * outputs * inputs / fastest(lambda: torch.nn.functional.linear(x, weight), seconds, device)


def copy_rate(seconds: float, device: str = "cpu", megabytes: int = 128) -> float:
    """Bytes read and written a second by a large copy."""
    import torch

    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / fastest(lambda: target.copy_(source), seconds, device)


def fastest(call: Callable[[], object], seconds: float, device: str = "cpu") -> float:
    """Seconds of the fastest call of those that fit into a time, at least two after a first one."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    call()
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begun)
    return min(times)


def shape_of(model: str) -> ModelShape:
    """Of one of SHAPES, a bundled name, or a folder."""
    if model in SHAPES:
        return read_shape(SHAPES[model])
    from tunesmith.models.source import resolve

    return read_shape(resolve(model))


def main() -> None:
    """Measures, and prints tables or one JSON document."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    result = measure(options)
    print(json.dumps(result, indent=1) if options.json else tables(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help=f"{', '.join(SHAPES)}, bundled name, or folder")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="measured: 1 to this")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the products at the model's shapes")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", default="115*8", help="LENGTH*COUNT,... of the rows of an update, for the floor")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of the tokens that have a label")
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all rows begin with, among them")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each product")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All products with all numbers of threads, and the floors that follow."""
    import torch

    shape = shape_of(options.model)
    shapes = {**SQUARES, **product_shapes(shape, options.tokens)}
    counts = sorted({1, options.threads})
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for threads in counts:
        torch.set_num_threads(threads)
        rates[str(threads)] = {
            dtype: {name: product_rate(*size, dtype, options.seconds) for name, size in shapes.items()}
            for dtype in ("bf16", "fp32")
        }
        rates[str(threads)]["copy"] = {"bytes_per_second": copy_rate(options.seconds)}
    lengths = [int(size) for part in options.rows.split(",") for size in _repeated(part)]
    return {
        "model": options.model, "shape": asdict(shape), "shapes": shapes, "rates": rates, "rows": lengths,
        "supervised_share": options.supervised, "rank": options.rank, "machine": machine(options.threads),
        "floors": floors(shape, lengths, options, rates[str(options.threads)]),
    }  # fmt: skip


def floors(
    shape: ModelShape, lengths: list[int], options: argparse.Namespace, rates: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """The floor of an update for LoRA and for full tuning, in both formats."""
    found = {}
    supervised = round(options.supervised * sum(lengths))
    for task, rank in (("LoRA", options.rank), ("full", 0)):
        for dtype, size in (("bf16", 2), ("fp32", 4)):
            work = step_work(shape, lengths, supervised, rank=rank, prefix=options.prefix, item_bytes=size)
            ceiling, bandwidth = max(rates[dtype].values()), rates["copy"]["bytes_per_second"]
            seconds = work.seconds(ceiling, bandwidth)
            found[f"{task} {dtype}"] = {
                "flops": work.flops, "flops_per_token": work.flops / sum(lengths), "bytes": work.bytes,
                "arithmetic_seconds": work.flops / ceiling, "memory_seconds": work.bytes / bandwidth,
                "seconds": seconds, "tokens_per_second": sum(lengths) / seconds,
            }  # fmt: skip
    return found


def tables(result: dict[str, Any]) -> str:
    """The same for people, in Markdown."""
    counts = list(result["rates"])
    heads = [f"{dtype}, {count} thread(s)" for dtype in ("bf16", "fp32") for count in counts]
    lines = [described(result["machine"]), "", f"| GFLOP/s | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, size in result["shapes"].items():
        cells = [f"{name} {'x'.join(map(str, size))}"]
        for dtype in ("bf16", "fp32"):
            for count in counts:
                rates = result["rates"][count][dtype]
                cells.append(f"{rates[name] / 1e9:,.0f} ({100 * rates[name] / max(rates.values()):.0f} %)")
        lines.append(f"| {' | '.join(cells)} |")
    copies = (f"{result['rates'][count]['copy']['bytes_per_second'] / 1e9:.1f} ({count})" for count in counts)
    lines += ["", f"copy, GB/s read and written (threads): {', '.join(copies)}", ""]
    lines += [
        f"floor of an update of {len(result['rows'])} rows, {sum(result['rows'])} tokens, "
        f"{100 * result['supervised_share']:.0f} % supervised, rank {result['rank']}, all threads:",
        "",
        "| | GFLOP a token | arithmetic, ms | memory, ms | tokens/s at most |",
        "|---|---|---|---|---|",
    ]
    for name, floor in result["floors"].items():
        times = f"{1000 * floor['arithmetic_seconds']:.1f} | {1000 * floor['memory_seconds']:.1f}"
        lines.append(f"| {name} | {floor['flops_per_token'] / 1e9:.3f} | {times} | {floor['tokens_per_second']:,.0f} |")
    return "\n".join(lines)


def _repeated(part: str) -> list[str]:
    length, _, count = part.partition("*")
    return [length] * int(count or 1)


if __name__ == "__main__":
    main()
