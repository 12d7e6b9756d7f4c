"""How fast this machine does what a step does, measured once for a second or two and kept in the cache.

The one idea: the products of one block and of the head, at the model's sizes and in the kernels that a run uses, one
pointwise pass and the starting of an operation. The least time of several counts, processor time where there is one
thread: what is planned is the time on a machine that does nothing else.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.files import cache_folder, canonical_json, strict_loads, write_atomic
from tunesmith.plan.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from tunesmith.models.load import Base
    from tunesmith.plan.trace import Traced

log = logging.getLogger(__name__)
TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FORMAT = 7  # of what is measured; other numbers in the cache are of something else
_MOST_FLOPS = 4e9  # of one product that is timed: larger ones are cut to fewer tokens
STREAM_BYTES = 1 << 26  # beyond any cache near a core
_HEAD_ROWS = 128  # of a chunk of logits


@dataclass(frozen=True)
class Calibration:
    """How fast this machine is at what a step does.

    Attributes:
        flops_per_second: products of a block with its weights, forward and to its inputs, in the compute dtype.
        gradient_flops_per_second: products that give the gradient of weights.
        head_flops_per_second: logits, and back.
        curved_seconds, drawn_seconds: for a number made by an exponential or the like, and one drawn at random, beyond
            what its bytes take.
        expanded_seconds: for a number made of codes, its writing included.
        bytes_per_second: read and written by pointwise operations that work on a micro-batch.
        operation_seconds: cost of starting one operation.
    """

    flops_per_second: float
    bytes_per_second: float
    operation_seconds: float
    gradient_flops_per_second: float = 0.0
    head_flops_per_second: float = 0.0
    curved_seconds: float = 0.0
    drawn_seconds: float = 0.0
    expanded_seconds: float = 0.0


def calibrate(
    shape: ModelShape,
    tokens: int,
    dtype: str = "fp32",
    *,
    base: Base = "same",
    seconds: float = 1.5,
    folder: Path | None = None,
) -> Calibration:
    """Measures this machine, or reads what it measured before for the same sizes, dtype, threads and torch.

    Args:
        tokens: of a micro-batch.
        dtype: fp32, bf16 or fp16.
        base: what frozen maps are held in.
        seconds: how long to measure, about.
        folder: where answers are kept; None is the cache folder.
    """
    import torch

    key = key_of(shape, tokens, dtype, torch.get_num_threads(), torch.__version__)
    key += "" if base == "same" else f" | {base}"
    return Calibration(
        **remembered(
            key,
            [field.name for field in fields(Calibration)],
            lambda: asdict(_measure(shape, tokens, getattr(torch, TORCH[dtype]), base, seconds)),
            folder,
        )
    )


def remembered(
    key: str, names: Sequence[str], measured: Callable[[], dict[str, float]], folder: Path | None = None
) -> dict[str, float]:
    """What was measured under a key before, or what is now, kept for the next time.

    Args:
        names: of the numbers, all above 0; anything else in the cache is measured again.
        folder: where answers are kept; None is the cache folder.
    """
    path = (folder or cache_folder()) / "calibration.json"
    known = _read(path)
    kept = known.get(key)
    if isinstance(kept, dict) and sorted(kept) == sorted(names):
        usable = {name: value for name, value in kept.items() if type(value) in (int, float) and value > 0}
        if len(usable) == len(kept):
            return usable
    found = measured()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical_json({**known, key: found}, indent=1))
    except OSError as error:
        log.warning("the speed of this machine is not kept, and is measured again next time: %s", error)
    return found


def step_seconds(traced: Traced, calibration: Calibration, head_flops: float = 0.0) -> float:
    """Seconds of one traced micro-batch: products, memory traffic and the starting of operations, one after another.

    Args:
        head_flops: of its work, in the head.
    """
    speed = calibration.flops_per_second
    gradients = max(0, traced.backward_flops - traced.forward_flops)
    others = max(0.0, traced.flops - gradients - head_flops)
    return (
        others / speed
        + gradients / (calibration.gradient_flops_per_second or speed)
        + head_flops / (calibration.head_flops_per_second or speed)
        + traced.traffic_bytes / calibration.bytes_per_second
        + traced.curved * calibration.curved_seconds
        + traced.drawn * calibration.drawn_seconds
        + traced.expanded * calibration.expanded_seconds
        + traced.operations * calibration.operation_seconds
    )


def _measure(shape: ModelShape, tokens: int, dtype: torch.dtype, base: Base, seconds: float) -> Calibration:
    import torch

    from tunesmith.kernels import products

    largest = max(inputs * outputs for inputs, outputs in shape.matrices().values())
    tokens = max(16, min(tokens, 4096, int(_MOST_FLOPS / (2 * largest))))
    maps = [operands(tokens, *sizes, dtype) for sizes in sorted(set(shape.matrices().values()))]
    rows = max(16, min(_HEAD_ROWS, int(_MOST_FLOPS / (2 * shape.head_parameters))))
    head = operands(rows, shape.d_model, shape.vocab, dtype)
    y = torch.randn(tokens, shape.d_mlp).to(dtype)
    small = torch.zeros(1)

    def with_weights() -> None:
        for x, weight, dy in maps:
            products.nt(x, weight)
            products.nn(dy, weight)  # the gradient of inputs

    def of_weights() -> None:
        for x, _, dy in maps:
            products.tn(dy, x)  # another layout, often slower

    def logits() -> None:
        x, weight, dy = head
        products.nt(x, weight)
        products.nn(dy, weight)

    # as in a step, where what is read was made long ago, in memory that was used before: not in the cache, and there
    ys = [torch.randn_like(y) for _ in range(max(2, STREAM_BYTES // (y.numel() * y.element_size())))]
    places = [torch.zeros_like(y) for _ in ys]

    def pointwise() -> None:
        for one, place in zip(ys, places, strict=True):
            torch.mul(one, 2.0, out=place)

    work = sum(2 * tokens * weight.numel() for _, weight, _ in maps)
    size, narrow = y.numel(), y.element_size()
    moved = 2 * size * narrow * len(ys)
    with torch.no_grad():
        point = least(pointwise, seconds * 0.15)
        start = least(lambda: torch.add(small, small), seconds * 0.05)
        # starting operations is paid apart: a tiny tensor must not look like slow memory
        speed = moved / max(point - len(ys) * start, point / 10)
        # these stay in the cache: what they take beyond a copy there is what they take beyond their bytes
        copied = least(lambda: torch.mul(y, 2.0), seconds * 0.05) / size
        curved = least(lambda: torch.nn.functional.gelu(y), seconds * 0.05) / size - copied
        drawn = least(lambda: y.bernoulli_(0.9), seconds * 0.05) / size - copied
        return Calibration(
            flops_per_second=2 * work / least(with_weights, seconds * 0.3),
            gradient_flops_per_second=work / least(of_weights, seconds * 0.2),
            head_flops_per_second=4 * rows * shape.head_parameters / least(logits, seconds * 0.2),
            bytes_per_second=speed,
            operation_seconds=start,
            curved_seconds=max(curved, 1e-12),
            drawn_seconds=max(drawn, 1e-12),
            expanded_seconds=_expanding(maps[-1][1], base, seconds * 0.1),
        )


def _expanding(weight: torch.Tensor, base: Base, seconds: float) -> float:
    """Seconds of a number that is made of codes."""
    from tunesmith.kernels.quantized import quantize

    if base == "same":
        return 1e-12
    held = quantize(weight, base, weight.dtype)
    return least(held.dense, seconds) / weight.numel()


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What a map takes, its weight, and the gradient of what it gives."""
    import torch

    sizes = ((rows, inputs), (outputs, inputs), (rows, outputs))
    return tuple(torch.randn(*size).to(dtype) for size in sizes)


def least(call: Callable[[], object], seconds: float) -> float:
    """Least seconds of a call: they owe least to what else runs here."""
    import torch

    # one thread is not charged for its neighbours; of several, those that wait for the others are charged, too
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 2000):
        begun = clock()
        call()
        times.append(clock() - begun)
    return max(min(times), 1e-9)


def key_of(shape: ModelShape, tokens: int, dtype: str, threads: int, version: str) -> str:
    size = 1 << (max(1, tokens) - 1).bit_length()  # one measurement serves all micro-batches of about this size
    sizes = f"{shape.d_model}x{shape.d_mlp}x{shape.vocab}"
    return f"{_FORMAT} | {_processor()} | torch {version} | {threads} threads | {dtype} | {sizes} | {size}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = strict_loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # a cache that cannot be read is measured again
    return found if isinstance(found, dict) else {}
