"""Every layout of a cluster, the fastest first, and what those that do not fit lack.

The one idea: one row for each way to spread processes (data, shard, tensor, pipeline); of what else can be chosen in it
(schedule, recomputation, rows of a micro-batch) the fastest that fits is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any, get_args

from tunesmith.parallel.layout import Shard
from tunesmith.plan.cluster import Cluster
from tunesmith.plan.layouts import How, Layout
from tunesmith.plan.loads import Lacks, StageMemory, Work
from tunesmith.plan.pieces import Pieces
from tunesmith.plan.placed import Board, Placed

CHUNKS = (2, 4)  # of each stage, where interleaved


@dataclass(frozen=True)
class Ranking:
    """All layouts of a cluster.

    Attributes:
        fitting: the fastest first.
        lacking: what does not fit, the one that lacks least memory first.
    """

    cluster: Cluster
    pieces: Pieces
    work: Work
    fitting: list[Placed]
    lacking: list[Lacks]

    def under_each_schedule(self, found: Placed) -> dict[str, Placed | Lacks]:
        """A layout under every schedule of a pipeline; by the name, with the chunks of a stage where there are more."""
        layout = found.layout
        board = Board(self.cluster, self.pieces, self.work, layout.tensor, layout.data, layout.pipeline)
        named = {f"{one.schedule} {one.chunks}".removesuffix(" 1"): one for one in schedules(board, layout)}
        return {name: board.place(one) for name, one in named.items() if layout.pipeline > 1}

    def as_dict(self, top: int) -> dict[str, Any]:
        """The answer of `tunesmith plan --cluster --json`."""
        return {
            "cluster": {
                "nodes": self.cluster.line(),
                "devices": self.cluster.devices,
                "peak_flops": self.cluster.peak_flops,
                "compute_efficiency": self.cluster.compute_efficiency,
                "link_efficiency": self.cluster.link_efficiency,
            },
            "rows_per_step": self.work.rows,
            "row_tokens": self.work.row_tokens,
            "layouts": [{**_placed(found), "schedules": self._schedules(found)} for found in self.fitting[:top]],
            "fitting": len(self.fitting),
            "lacking": [_lacks(found) for found in self.lacking],
        }

    def _schedules(self, found: Placed) -> dict[str, dict[str, float]]:
        return {
            name: {"idle": one.idle, "seconds": one.seconds, "peak_bytes": one.peak_bytes}
            if isinstance(one, Placed)
            else {"lacks_bytes": one.missing_bytes}
            for name, one in self.under_each_schedule(found).items()
        }


def rank(cluster: Cluster, pieces: Pieces, work: Work) -> Ranking:
    """Places a model in every way that uses all devices."""
    fitting: list[Placed] = []
    lacking: list[Lacks] = []
    for tensor, data, pipeline in spreads(cluster, pieces):
        board = Board(cluster, pieces, work, tensor, data, pipeline)
        for shard in get_args(Shard) if data > 1 else ("none",):
            found = _best(board, Layout(data=data, shard=shard, tensor=tensor, pipeline=pipeline))
            (fitting if isinstance(found, Placed) else lacking).append(found)  # type: ignore[arg-type]
    fitting.sort(key=_order)
    lacking.sort(key=_distance)
    return Ranking(cluster, pieces, work, fitting, lacking)


def spreads(cluster: Cluster, pieces: Pieces) -> Iterator[tuple[int, int, int]]:
    """(tensor, data, pipeline) whose product is all devices: whole heads a process, a block for each stage or more."""
    shape = pieces.shape
    for tensor in cluster.tensor_sizes():
        if shape.n_heads % tensor or (shape.n_kv_heads % tensor and tensor % shape.n_kv_heads):
            continue
        groups = cluster.devices // tensor
        for pipeline in range(1, min(groups, len(pieces.blocks)) + 1):
            if groups % pipeline == 0:
                yield tensor, groups // pipeline, pipeline


def schedules(board: Board, layout: Layout) -> Iterator[Layout]:
    """A layout under every schedule that it allows. Interleaving wants as many micro-batches as stages, or a multiple
    (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)."""
    if layout.pipeline == 1:
        yield replace(layout, schedule="none", chunks=1)
        return
    yield replace(layout, schedule="gpipe", chunks=1)
    yield replace(layout, schedule="1f1b", chunks=1)
    micro_batches, uneven = divmod(board.work.rows // layout.micro_rows, layout.data)
    for chunks in CHUNKS:
        if not uneven and micro_batches % layout.pipeline == 0 and len(board.pieces.blocks) >= chunks * layout.pipeline:
            yield replace(layout, schedule="interleaved", chunks=chunks)


def _best(board: Board, layout: Layout) -> Placed | Lacks:
    """The fastest that fits; else what the thriftiest lacks."""
    best: Placed | None = None
    nearest: Lacks | None = None
    bound = inf
    for micro_rows in _micro_rows(board.work.rows):
        fewer, bound = bound, board.least_seconds(replace(layout, micro_rows=micro_rows, chunks=max(CHUNKS)))
        if best is not None and bound >= max(best.seconds, fewer):
            break  # the bound falls with the rows, and then rises: nothing better follows
        found = [_least_again(board, one, best) for one in _searched(board, replace(layout, micro_rows=micro_rows))]
        fitting = [one for one in found if isinstance(one, Placed)]
        if not fitting and None not in found:
            nearest = min([one for one in (*found, nearest) if isinstance(one, Lacks)], key=_distance)
            break  # more rows at a time take more memory, and leave fewer micro-batches
        best = min([*fitting, *filter(None, [best])], key=_order)
    if best is not None:
        return best
    assert nearest is not None
    return nearest


def _searched(board: Board, layout: Layout) -> list[Layout]:
    """Schedules without gpipe, which is as fast as 1f1b and never has less memory."""
    return [one for one in schedules(board, layout) if one.schedule != "gpipe"]


def _least_again(board: Board, layout: Layout, best: Placed | None) -> Placed | Lacks | None:
    """The layout with the least recomputation that fits: more of it is never faster. None where it cannot be best."""
    if best is not None and board.least_seconds(layout) >= best.seconds:
        return None
    found: Placed | Lacks = Lacks(layout)
    for how in get_args(How):
        found = board.place(replace(layout, recompute=how))
        if isinstance(found, Placed) or found.rows:
            break
    return found


def _micro_rows(rows: int) -> Iterator[int]:
    """Powers of two that divide the rows of a step."""
    size = 1
    while rows % size == 0:
        yield size
        size *= 2


def _distance(found: Lacks) -> tuple[int, int]:
    return found.rows, found.missing_bytes


def _order(found: Placed) -> tuple[float, float, int]:
    return found.seconds, found.exposed_seconds, found.peak_bytes


def _placed(found: Placed) -> dict[str, Any]:
    return {
        **_layout(found.layout),
        "micro_batches": found.micro_batches,
        "seconds": found.seconds,
        "exposed_seconds": found.exposed_seconds,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "idle": found.idle,
        "peak_bytes": found.peak_bytes,
        "sent_bytes": found.sent_bytes,
        "stages": [_stage(stage) for stage in found.stages],
    }


def _stage(stage: StageMemory) -> dict[str, int]:
    return {
        "blocks": stage.blocks,
        "weights_bytes": stage.state.weights_bytes,
        "master_bytes": stage.state.master_bytes,
        "gradients_bytes": stage.state.gradients_bytes,
        "optimizer_bytes": stage.state.optimizer_bytes,
        "activations_bytes": stage.activations_bytes,
        "buffers_bytes": stage.buffers_bytes,
        "total_bytes": stage.total_bytes,
        "room_bytes": stage.room_bytes,
    }


def _lacks(found: Lacks) -> dict[str, Any]:
    lacks = {"rows": found.rows} if found.rows else {"bytes": found.missing_bytes}
    return {**_layout(found.layout), "lacks": lacks}


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "data": layout.data,
        "shard": layout.shard,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "schedule": layout.schedule,
        "chunks": layout.chunks,
        "recompute": layout.recompute,
        "micro_rows": layout.micro_rows,
    }
