"""Work and time: FLOPs a token, FLOPs of a run, and seconds from a two-second measurement of this machine.

The closed form counts forward, the gradient of inputs and the gradient of weights apart, because freezing saves only
the last. A traced model (`trace`) gives the exact number; this one serves where only a config is at hand.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.files import cache_folder, canonical_json, strict_loads, write_atomic
from tunesmith.plan.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from tunesmith.plan.trace import Traced

log = logging.getLogger(__name__)
_TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Flops:
    """Work for one token, on average; one multiply-add is two.

    Attributes:
        forward: matrices of the blocks and inserted ones.
        backward_inputs: gradients handed down through matrices, frozen or not.
        backward_weights: gradients of what trains; nothing for what is frozen.
        attention_forward, attention_backward: scores and their use, counted as full squares.
        head: logits at supervised tokens only, all directions.
    """

    forward: float
    backward_inputs: float
    backward_weights: float
    attention_forward: float
    attention_backward: float
    head: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def flops_per_token(
    shape: ModelShape,
    *,
    trained: int,
    inserted: int = 0,
    context: float,
    supervised_share: float = 1.0,
    lowest: int = 0,
    head_trained: bool = False,
) -> Flops:
    """Closed-form work of a step, for each token.

    Args:
        trained: numbers in matrices of the blocks (inserted ones too) whose gradients are wanted.
        inserted: numbers in matrices that an adapter adds.
        context: tokens of the document that a token lies in, on average over tokens: sum of squares / sum of lengths.
        supervised_share: tokens with a target / tokens.
        lowest: first block that trains; below it nothing is handed down. That block is counted whole.
        head_trained: the matrix of the head moves, too.

    Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1 (2 N forward, 4 N backward); the recomputed scores in
    the backward of attention are those of Dao et al. 2022, arXiv 2205.14135 (5 products against 2).
    """
    matrices = shape.matrix_parameters + inserted
    passed = matrices * (shape.n_layers - lowest) / shape.n_layers
    scores = 4.0 * shape.n_layers * shape.n_heads * shape.d_head * context
    directions = 3 if head_trained else 2
    return Flops(
        forward=2.0 * matrices,
        backward_inputs=2.0 * passed,
        backward_weights=2.0 * trained,
        attention_forward=scores,
        attention_backward=2.5 * scores * (shape.n_layers - lowest) / shape.n_layers,
        head=2.0 * directions * shape.head_parameters * supervised_share,
    )


@dataclass(frozen=True)
class Calibration:
    """How fast this machine is at what a step does.

    Attributes:
        flops_per_second: matrix products in the compute dtype at the model's shapes.
        bytes_per_second: read and written by pointwise operations that work on a micro-batch.
        operation_seconds: cost of starting one operation.
    """

    flops_per_second: float
    bytes_per_second: float
    operation_seconds: float


def calibrate(
    shape: ModelShape, tokens: int, dtype: str = "fp32", *, seconds: float = 1.5, folder: Path | None = None
) -> Calibration:
    """Measures this machine, or reads what it measured before for the same sizes, dtype, threads and torch.

    Args:
        tokens: of a micro-batch.
        dtype: fp32, bf16 or fp16.
        seconds: how long to measure, about.
        folder: where answers are kept; None is the cache folder.
    """
    import torch

    key = _key(shape, tokens, dtype, torch.get_num_threads(), torch.__version__)
    path = (folder or cache_folder()) / "calibration.json"
    known = _read(path)
    if kept := _calibration(known.get(key)):
        return kept
    found = _measure(shape, tokens, getattr(torch, _TORCH[dtype]), seconds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical_json({**known, key: asdict(found)}, indent=1))
    except OSError as error:
        log.warning("the speed of this machine is not kept, and is measured again next time: %s", error)
    return found


def step_seconds(traced: Traced, calibration: Calibration) -> float:
    """Seconds of one traced micro-batch: products, memory traffic and the starting of operations, one after another."""
    return (
        traced.flops / calibration.flops_per_second
        + traced.traffic_bytes / calibration.bytes_per_second
        + traced.operations * calibration.operation_seconds
    )


def _measure(shape: ModelShape, tokens: int, dtype: torch.dtype, seconds: float) -> Calibration:
    import torch

    tokens = max(16, min(tokens, 4096))
    x = torch.randn(tokens, shape.d_model).to(dtype)
    weight = torch.randn(shape.d_mlp, shape.d_model).to(dtype)
    y = torch.randn(tokens, shape.d_mlp).to(dtype)
    small = torch.zeros(1)

    def products() -> None:
        torch.nn.functional.linear(x, weight)
        torch.mm(y, weight)  # the gradient of inputs
        torch.mm(y.T, x)  # the gradient of weights: another layout, often slower

    def pointwise() -> None:
        torch.nn.functional.silu(y)
        torch.mul(y, y)
        torch.mul(y.float(), 2.0)  # norms and losses work in float32

    work = 3 * 2 * tokens * shape.d_model * shape.d_mlp
    moved = y.numel() * (5 * y.element_size() + y.element_size() + 3 * 4)
    with torch.no_grad():
        product = _typical(products, seconds * 0.5)
        point = _typical(pointwise, seconds * 0.4)
        start = _typical(lambda: torch.add(small, small), seconds * 0.1)
    # starting operations is paid apart: a tiny tensor must not look like slow memory
    return Calibration(work / product, moved / max(point - 4 * start, point / 10), start)


def _typical(call: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call: a busy neighbour slows some calls, and the run will meet it, too."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 2000):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def _key(shape: ModelShape, tokens: int, dtype: str, threads: int, version: str) -> str:
    size = 1 << (max(1, tokens) - 1).bit_length()  # one measurement serves all micro-batches of about this size
    return f"{_processor()} | torch {version} | {threads} threads | {dtype} | {shape.d_model}x{shape.d_mlp} | {size}"


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


def _calibration(found: Any) -> Calibration | None:
    """What was measured before; None where it is not there or not what was written."""
    names = [field.name for field in fields(Calibration)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        return None
    usable = all(type(value) in (int, float) and value > 0 for value in found.values())
    return Calibration(**found) if usable else None
