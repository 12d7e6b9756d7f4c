"""A layout on the devices of a cluster: how blocks and rows are shared out, what is sent, how long a step takes.

The one idea: a step is its slowest replica's pipeline, what of the collectives cannot hide behind computing, and the
optimizer's update. What is assumed is named in docs/cluster.md; what stages hold is in `loads`, the closed forms are in
`layouts`, the exact splits in `stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from tunesmith.plan import links
from tunesmith.plan.cluster import Cluster, Placement, slowest
from tunesmith.plan.layouts import Layout, data_messages, data_traffic, idle_share, pipeline_seconds
from tunesmith.plan.loads import Costs, Lacks, Loads, StageMemory, Work
from tunesmith.plan.pieces import Pieces
from tunesmith.plan.stages import share_out, split_blocks


@dataclass(frozen=True)
class Placed:
    """A layout that fits.

    Attributes:
        stages: memory of a process of each stage.
        micro_batches: of each replica in a step.
        sent_bytes: of the process that sends most of it, a step, by kind.
        idle: share of the time that stages wait for each other, on average.
        seconds: of a step, what can be hidden behind computing hidden.
        exposed_seconds: of a step where nothing is hidden.
        mfu: work that is needed over the peak of all devices.
    """

    layout: Layout
    stages: list[StageMemory]
    micro_batches: list[int]
    sent_bytes: dict[str, int]
    idle: float
    seconds: float
    exposed_seconds: float
    tokens_per_second: float
    mfu: float

    @property
    def peak_bytes(self) -> int:
        """Of the fullest process."""
        return max(stage.total_bytes for stage in self.stages)


class Board:
    """A model on a cluster, for one number of tensor, data and pipeline processes."""

    def __init__(self, cluster: Cluster, pieces: Pieces, work: Work, tensor: int, data: int, pipeline: int) -> None:
        self.cluster, self.pieces, self.work = cluster, pieces, work
        self.placement = Placement(cluster, tensor, data, pipeline)
        self._cuts: dict[tuple[str, int], list[int]] = {}
        self._costs: dict[tuple[str, int], Costs] = {}

    def place(self, layout: Layout) -> Placed | Lacks:
        """The layout on this board; its sizes are those of the board."""
        total = self.work.rows // layout.micro_rows
        if total < layout.data:
            return Lacks(layout, rows=layout.data * layout.micro_rows - self.work.rows)
        loads = self._loads(layout)
        counts = self._cut(loads) if loads.fits_somehow() else None
        if counts is None:
            return loads.lacking()
        return _Step(self, loads, list(accumulate(counts, initial=0)), total).result()

    def least_seconds(self, layout: Layout) -> float:
        """A time that the layout cannot be faster than: computing alone, memory aside. 0 where devices are unequal."""
        if len(self.cluster.nodes) > 1:
            return 0.0
        loads = self._loads(layout)
        cuts = list(accumulate(self._evenest(loads), initial=0))
        # all cuts have the same sum, so the one with the least largest stage is the fastest
        times = [loads.seconds(stage, cuts[stage], cuts[stage + 1]) for stage in range(layout.pipeline)]
        return pipeline_seconds(times, loads.micro_batches, layout.chunks)

    def _loads(self, layout: Layout) -> Loads:
        key = (layout.recompute, layout.micro_rows)
        micro_batches = ceil(self.work.rows // layout.micro_rows / layout.data)
        tokens = self.work.row_tokens
        found = Loads(self.pieces, self.placement, layout, tokens, micro_batches, self._costs.get(key))
        self._costs[key] = found.costs
        return found

    def _evenest(self, loads: Loads) -> list[int]:
        """Blocks of each stage, memory aside: the same for every shard and schedule."""
        layout = loads.layout
        key = (layout.recompute, layout.micro_rows)
        if key not in self._cuts:
            self._cuts[key] = split_blocks(len(self.pieces.blocks), layout.pipeline, loads.seconds) or []
        return self._cuts[key]

    def _cut(self, loads: Loads) -> list[int] | None:
        """Blocks of each stage: the evenest cut, or the evenest of those that fit."""
        counts = self._evenest(loads)
        cuts = list(accumulate(counts, initial=0))
        stages = loads.layout.pipeline
        if all(loads.fits(stage, cuts[stage], cuts[stage + 1]) for stage in range(stages)):
            return counts
        return split_blocks(len(self.pieces.blocks), stages, loads.fitting_seconds)


class _Step:
    """The time of a step, and what is sent in it, of stages that are cut."""

    def __init__(self, board: Board, loads: Loads, cuts: Sequence[int], total: int) -> None:
        self.board, self.loads, self.layout, self.total = board, loads, loads.layout, total
        self.pieces, self.placement = board.pieces, board.placement
        self.spans = [(stage, cuts[stage], cuts[stage + 1]) for stage in range(self.layout.pipeline)]
        self.states = [loads.whole(*span) for span in self.spans]
        self.sent_once = loads.tokens * self.pieces.shape.d_model * self.pieces.item_bytes

    def result(self) -> Placed | Lacks:
        layout, work = self.layout, self.board.work
        hidden, exposed = self._slots(True), self._slots(False)
        fill = 2 * sum(link.message(self.sent_once) for link in self.placement.stage_links)
        counts = self._shares(hidden)
        if counts is None:
            return self.loads.lacking()
        per_kind: dict[int, int] = {}
        for kind, count in zip(self.placement.members, counts, strict=True):
            per_kind[kind] = max(per_kind.get(kind, 0), count)
        most = max(counts)
        ends = [self._last(slots, per_kind) + fill for slots in (hidden, exposed)]
        once = [max(self._once(stage, hide) for stage in range(layout.pipeline)) for hide in (True, False)]
        update = max(map(self._update, range(layout.pipeline)))
        seconds, exposed_seconds = (end + more + update for end, more in zip(ends, once, strict=True))
        useful = work.tokens * self.pieces.useful_flops
        return Placed(
            layout=layout,
            stages=[self.loads.memory(*span) for span in self.spans],
            micro_batches=counts,
            sent_bytes=self._sent(most),
            idle=self._idle(hidden, counts, ends[0] - fill),
            seconds=seconds,
            exposed_seconds=exposed_seconds,
            tokens_per_second=work.tokens / seconds,
            mfu=useful / (seconds * self.board.cluster.peak_flops),
        )

    def _slots(self, hide: bool) -> list[list[float]]:
        """Of each kind of replica, seconds of a micro-batch on each stage."""
        found = []
        for nodes, _ in self.placement.replicas:
            times = []
            for (stage, first, end), node in zip(self.spans, nodes, strict=True):
                computing, moving = self.loads.of_node(node, stage, first, end)[0], self._each(stage)
                times.append(max(computing, moving) if hide else computing + moving + self._sends(stage))
            found.append(times)
        return found

    def _shares(self, slots: list[list[float]]) -> list[int] | None:
        """Micro-batches of each replica."""
        members, chunks = self.placement.members, self.layout.chunks
        longest = [max(times) for times in slots]
        before = [(sum(times) - max(times)) / chunks for times in slots]
        most = self._most()
        if len(slots) == 1:
            each, more = divmod(self.total, len(members))
            counts = [each + (index < more) for index in range(len(members))]
            return counts if counts[0] <= most else None
        seconds = [longest[kind] for kind in members]
        return share_out(self.total, seconds, [before[kind] for kind in members], [most] * len(members))

    def _most(self) -> int:
        """Micro-batches that a replica has memory for: all, unless the schedule keeps every one."""
        if self.layout.schedule != "gpipe":
            return self.total
        found = self.total
        for stage, first, end in self.spans:
            kept = self.loads.kept[end] - self.loads.kept[first]
            spare = self.loads.rooms[stage] - self.loads.bytes(stage, first, end)
            if kept:
                found = min(found, int(self.loads.micro_batches + spare // kept))
        return found

    def _last(self, slots: list[list[float]], counts: dict[int, int]) -> float:
        """When the last replica has computed."""
        chunks = self.layout.chunks
        return max(pipeline_seconds(slots[kind], count, chunks) for kind, count in counts.items())

    def _idle(self, slots: list[list[float]], counts: list[int], end: float) -> float:
        if len(slots) == 1 and len(set(counts)) == 1:
            return idle_share(slots[0], counts[0], self.layout.chunks)
        busy = sum(count * sum(slots[kind]) for kind, count in zip(self.placement.members, counts, strict=True))
        return 1 - busy / (len(counts) * self.layout.pipeline * end)

    def _each(self, stage: int) -> float:
        """Seconds of collectives between replicas for each micro-batch."""
        return self._collectives(stage, data_messages(self.states[stage], self.layout.shard)[0])

    def _once(self, stage: int, hide: bool) -> float:
        """Seconds of those at the end of a step that are not hidden behind the last micro-batch's backward."""
        taken = self._collectives(stage, data_messages(self.states[stage], self.layout.shard)[1])
        if hide:
            nodes = self.placement.stages[stage]
            taken = max(0.0, taken - max(self.loads.of_node(node, *self.spans[stage])[1] for node in nodes))
        return taken + self._tied_seconds()

    def _collectives(self, stage: int, buffers: dict[str, float]) -> float:
        """One collective for each part of the stage, so that it can begin before the whole is there."""
        if self.layout.data == 1:
            return 0.0
        link, (_, first, end) = self.placement.data_links[stage], self.spans[stage]
        parts = max(1, end - first)
        calls = {"all_reduce": links.all_reduce, "reduce_scatter": links.reduce_scatter, "all_gather": links.all_gather}
        return sum(
            parts * calls[kind](link, self.layout.data, count / parts) for kind, count in buffers.items() if count
        )

    def _tied_seconds(self) -> float:
        """Both ends of a pipeline add up the gradients of the table that they share."""
        shared = self._tied_bytes()
        return links.all_reduce(slowest(self.placement.stage_links), 2, shared) if shared else 0.0

    def _tied_bytes(self) -> int:
        if self.layout.pipeline == 1:
            return 0
        return self.pieces.copied.part(self.layout.tensor).gradients_bytes

    def _sends(self, stage: int) -> float:
        """Seconds of handing activations up and gradients down, for each micro-batch."""
        chunks, between = self.layout.chunks, self.placement.stage_links
        above = [between[stage]] if stage < len(between) else []
        below = [between[stage - 1]] if stage and self._hands_down(stage) else []
        return chunks * sum(link.message(self.sent_once) for link in (*above, *below))

    def _hands_down(self, stage: int) -> bool:
        """Whether the stage below wants gradients: something in it, or below it, trains."""
        _, _, end = self.spans[stage - 1]
        return (self.pieces.blocks[end - 1] if end else self.pieces.embed).learns

    def _update(self, stage: int) -> float:
        """The optimizer reads and writes what it holds."""
        state = self.loads.spread(self.states[stage])
        touched = state.master_bytes + state.gradients_bytes + state.optimizer_bytes + state.trained_bytes
        return 2 * touched / min(node.memory_bandwidth for node in self.placement.stages[stage])

    def _sent(self, micro_batches: int) -> dict[str, int]:
        """Bytes of the process that sends most, by kind."""
        layout, found = self.layout, dict.fromkeys(("all_reduce", "reduce_scatter", "all_gather"), 0.0)
        for state in self.states:
            for kind, count in data_traffic(state, layout.shard, layout.data, micro_batches).items():
                found[kind] = max(found[kind], count)
        tensor = max(self._tensor_reductions(span) for span in self.spans) * micro_batches * self.sent_once
        found["tensor"] = 2 * tensor * (layout.tensor - 1) / layout.tensor
        crossings = [
            (stage < layout.pipeline - 1) + (stage > 0 and self._hands_down(stage)) for stage in range(layout.pipeline)
        ]
        found["pipeline"] = max(crossings) * layout.chunks * micro_batches * self.sent_once + self._tied_bytes()
        return {kind: round(count) for kind, count in found.items()}

    def _tensor_reductions(self, span: tuple[int, int, int]) -> int:
        stage, first, end = span
        parts = [*self.pieces.blocks[first:end], *self.loads.outer(stage)]
        return sum(sum(self.loads.reductions(part)) for part in parts)
