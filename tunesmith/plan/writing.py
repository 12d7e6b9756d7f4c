"""What writing answers takes: keys and values of the rows that are written together, and seconds of a token.

The one idea: a token of each row is one pass over all weights, in products of as many rows; these are measured at the
model's sizes, with weights from memory as in writing. How rows are written is `models.running` and `models.padded`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.plan.calibration import STREAM_BYTES, TORCH, Calibration, key_of, least, operands, remembered
from tunesmith.plan.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from tunesmith.plan.plan import Plan

PAGE = 32  # tokens of a row that keys and values are set aside for at a time
_OPERATIONS = 14  # of a block, for a token


@dataclass(frozen=True)
class Writing:
    """Answers that a run has written.

    Attributes:
        prompts: tokens of each prompt that is read, one for each answer.
        limit: tokens of an answer at most.
        at_once: answers that are written together, at most.
        tokens: written in the whole run, at most.
        read_tokens: of prompts, in the whole run.
        judged: how often each answer is read again by models that say what it is worth, or how likely it was.
        learnt: the run learns from them, so that they are part of its work, and moments are there beside them.
        laid_bytes: of weights that are laid out once more for this.
    """

    prompts: tuple[int, ...]
    limit: int
    at_once: int
    tokens: int
    read_tokens: int
    judged: int = 0
    learnt: bool = False
    laid_bytes: int = 0

    @property
    def rows(self) -> int:
        """Written together."""
        return min(self.at_once, len(self.prompts))

    @property
    def context(self) -> float:
        """Tokens before a token that is written, on average."""
        return sum(self.prompts) / max(1, len(self.prompts)) + self.limit / 2

    def cache_bytes(self, shape: ModelShape, item_bytes: int) -> int:
        """Keys and values of the longest rows that are written together, whole pages of each (Kwon et al. 2023, arXiv
        2309.06180, section 4.1), and one page to spare."""
        longest = sorted(self.prompts, reverse=True)[: self.rows]
        pages = 1 + sum(-(-(prompt + self.limit) // PAGE) for prompt in longest)
        return 2 * pages * PAGE * shape.n_layers * shape.n_kv_heads * shape.d_head * item_bytes

    def logits_bytes(self, shape: ModelShape) -> int:
        """Of one token of each row, in float32, and once more as a token is drawn from them."""
        return 2 * 4 * self.rows * shape.vocab

    def flops(self, shape: ModelShape) -> int:
        """Of reading prompts, writing answers and judging them: a forward of each token, logits of those written."""
        scores = 4.0 * shape.n_layers * shape.n_heads * shape.d_head * self.context
        read = self.tokens + self.read_tokens + self.judged * self.judged_tokens
        blocks = read * (2.0 * shape.matrix_parameters + scores)
        return round(blocks + 2.0 * (1 + self.judged) * self.tokens * shape.head_parameters)

    @property
    def judged_tokens(self) -> int:
        """Of answers with their prompts, in the whole run."""
        return round(self.tokens / self.limit * (self.context + self.limit / 2))


def writing_seconds(writing: Writing, shape: ModelShape, calibration: Calibration, dtype: str, **where: Path) -> float:
    """Seconds of reading the prompts and writing the answers on this machine.

    Args:
        where: `folder`, in which what is measured is kept.
    """
    item_bytes = 4 if dtype == "fp32" else 2
    products = _products_seconds(shape, writing.rows, dtype, where.get("folder"))
    keys = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * item_bytes * writing.context * writing.rows
    turn = products + keys / calibration.bytes_per_second
    turn += _OPERATIONS * shape.n_layers * calibration.operation_seconds
    read = writing.read_tokens + writing.judged * writing.judged_tokens
    logits = 2.0 * writing.judged * writing.tokens * shape.head_parameters
    reading = (2.0 * shape.matrix_parameters * read + logits) / calibration.flops_per_second
    return reading + turn * writing.tokens / max(1, writing.rows)


def with_writing(plan: Plan, writing: Writing, shape: ModelShape, item_bytes: int, seconds: float | None) -> Plan:
    """A plan with what a run writes: its memory, and its work where the run learns from it.

    Args:
        seconds: `writing_seconds`; None where the machine was not measured.
    """
    memory = plan.memory
    kept = dict(memory.phases["save"] if writing.learnt else memory.phases["load"])
    kept["weights"] += writing.laid_bytes
    cache = writing.cache_bytes(shape, item_bytes)
    phase = {**kept, "cache": cache, "activations": writing.logits_bytes(shape)}
    known = memory.phases.get("write", {})
    fuller = phase if sum(phase.values()) > sum(known.values()) else known
    memory = replace(
        memory,
        cache_bytes=max(memory.cache_bytes, cache),
        peak_bytes=max(memory.peak_bytes, sum(phase.values())),
        phases={**memory.phases, "write": fuller},
    )
    if not writing.learnt:
        return replace(plan, memory=memory)
    told = {"tokens": writing.tokens, "rows_at_once": writing.rows, "seconds": seconds}
    whole = None if plan.seconds is None or seconds is None else plan.seconds + seconds
    return replace(plan, memory=memory, flops=plan.flops + writing.flops(shape), seconds=whole, writing=told)


def _products_seconds(shape: ModelShape, rows: int, dtype: str, folder: Path | None) -> float:
    """Of all maps and the head, for a token of each row."""
    import torch

    key = key_of(shape, rows, dtype, torch.get_num_threads(), torch.__version__)
    names = ["block_seconds", "head_seconds"]
    found = remembered(f"{key} | writing", names, lambda: _measured(shape, rows, getattr(torch, TORCH[dtype])), folder)
    return shape.n_layers * found["block_seconds"] + found["head_seconds"]


def _measured(shape: ModelShape, rows: int, dtype: torch.dtype, seconds: float = 0.6) -> dict[str, float]:
    import torch

    from tunesmith.kernels.packed import Packed

    def laid(sizes: Sequence[tuple[int, int]]) -> list[tuple[torch.Tensor, Packed]]:
        made = (operands(rows, *one, dtype) for one in sizes)
        return [(x, Packed([weight])) for x, weight, _ in made]

    sizes = sorted(shape.matrices().values())
    block = sum(inputs * outputs for inputs, outputs in sizes) * dtype.itemsize
    # other weights each time, as in a model that is larger than any cache
    blocks = [laid(sizes) for _ in range(max(1, min(shape.n_layers, STREAM_BYTES // block)))]
    head = laid([(shape.d_model, shape.vocab)])

    def multiplied(maps: Sequence[tuple[torch.Tensor, Packed]]) -> None:
        for x, weight in maps:
            weight(x)

    def all_blocks() -> None:
        for one in blocks:
            multiplied(one)

    with torch.no_grad():
        return {
            "block_seconds": least(all_blocks, seconds * 0.7) / len(blocks),
            "head_seconds": least(lambda: multiplied(head), seconds * 0.3),
        }
