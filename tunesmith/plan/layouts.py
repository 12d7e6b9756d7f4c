"""A layout and its closed forms: micro-batches in flight, the idle share of a pipeline, bytes that a process sends.

The one idea: what the textbook says of a layout stands here alone, of the numbers of one process; where the processes
lie and how long everything takes is in `placed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.parallel.layout import Shard
from tunesmith.plan.pieces import State

Schedule = Literal["none", "gpipe", "1f1b", "interleaved"]
How = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """One point of what can be chosen.

    Attributes:
        data: replicas that share the rows of a step.
        shard: what is split between these.
        tensor: processes that split each matrix.
        pipeline: stages.
        schedule: in which order stages take micro-batches; none for one stage.
        chunks: pieces of the model that each stage holds; above 1 where interleaved.
        recompute: what is made again in the backward.
        micro_rows: rows of a micro-batch.
    """

    data: int = 1
    shard: Shard = "none"
    tensor: int = 1
    pipeline: int = 1
    schedule: Schedule = "none"
    chunks: int = 1
    recompute: How = "none"
    micro_rows: int = 1


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most, counted from 0.

    gpipe keeps all (Huang et al. 2019, arXiv 1811.06965); 1f1b as many as there are stages from this one on
    (Narayanan et al. 2021, arXiv 2104.04473, section 2.2); interleaved a little more, in chunks (section 2.2, and the
    warm-up of its schedule: two for each later stage, and all earlier chunks).
    """
    if layout.schedule == "gpipe":
        return micro_batches
    later = layout.pipeline - stage
    if layout.chunks == 1:
        return min(micro_batches, later)
    warm = 2 * (later - 1) + (layout.chunks - 1) * layout.pipeline + 1
    return min(micro_batches, warm / layout.chunks)


def pipeline_seconds(stages: Sequence[float], micro_batches: int, chunks: int = 1) -> float:
    """Seconds until all micro-batches have gone through stages that take so long each for one, forward and backward.

    The slowest stage is never without work between its first and its last; the others' time is filling and draining.
    For equal stages: (K + (P - 1) / V) t, of which (P - 1) / (V K + P - 1) is idle.
    """
    slowest = max(stages)
    return micro_batches * slowest + (sum(stages) - slowest) / chunks


def idle_share(stages: Sequence[float], micro_batches: int, chunks: int = 1) -> float:
    """Of the time of all stages, how much they wait: (P - 1) / (V K + P - 1) where they are equal."""
    busy = micro_batches * sum(stages)
    return 1 - busy / (len(stages) * pipeline_seconds(stages, micro_batches, chunks))


def data_traffic(state: State, shard: Shard, data: int, micro_batches: float) -> dict[str, float]:
    """Bytes that a process sends for its replicas in a step, by collective (arXiv 1910.02054, section 7).

    2 psi for none, zero1 and zero2 and 3 psi for zero3, each times (N - 1) / N, counted from gradients and weights
    apart: frozen weights are only gathered. zero2 and zero3 move gradients for each micro-batch.
    """
    each, once = data_messages(state, shard)
    moved = {kind: micro_batches * count for kind, count in each.items()}
    for kind, count in once.items():
        moved[kind] = moved.get(kind, 0.0) + count
    twice = {"all_reduce": 2}
    return {kind: twice.get(kind, 1) * count * (data - 1) / data for kind, count in moved.items() if count}


def data_messages(state: State, shard: Shard) -> tuple[dict[str, float], dict[str, float]]:
    """Buffers of collectives between replicas, by kind: for each micro-batch, and once a step."""
    gradients, trained, weights = state.gradients_bytes, state.trained_bytes, state.weights_bytes
    if shard == "none":
        return {}, {"all_reduce": gradients}
    if shard == "zero1":
        return {}, {"reduce_scatter": gradients, "all_gather": trained}
    if shard == "zero2":
        return {"reduce_scatter": gradients}, {"all_gather": trained}
    # gathered for the forward and once more for the backward
    return {"reduce_scatter": gradients, "all_gather": 2 * weights}, {}


def tensor_reductions(recompute: How, learns: bool) -> int:
    """All-reduces of a block's activations for a micro-batch: 2 forward and 2 backward (Shoeybi et al. 2019,
    arXiv 1909.08053, section 3), and 2 more where the forward runs again."""
    if not learns:
        return 2
    return 6 if recompute == "full" else 4
