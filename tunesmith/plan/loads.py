"""What a layout puts on each stage of a pipeline: bytes of a process, seconds of a micro-batch, before blocks are cut.

The one idea: everything a stage needs is a sum over its parts, so sums over the first blocks are made once and any
stage is a difference of two. A step that is made of them is in `placed`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf

from tunesmith.plan import links
from tunesmith.plan.cluster import Node, Placement
from tunesmith.plan.layouts import Layout, in_flight, tensor_reductions
from tunesmith.plan.pieces import Part, Pieces, State


@dataclass(frozen=True)
class Work:
    """What one step learns from.

    Attributes:
        rows: of a step.
        row_tokens: of each, the longest there are.
    """

    rows: int
    row_tokens: int

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one process of a stage holds at most.

    Attributes:
        blocks: of the model, on this stage.
        state: weights, masters, gradients and moments.
        activations_bytes: of all micro-batches in flight.
        buffers_bytes: whole weights of two parts at a time, where weights are spread.
        room_bytes: what its device has for tensors.
    """

    blocks: int
    state: State
    activations_bytes: int
    buffers_bytes: int
    room_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.state.total_bytes + self.activations_bytes + self.buffers_bytes


@dataclass(frozen=True)
class Lacks:
    """A layout that does not fit, and what it lacks: bytes on a device, or rows of a step.

    Attributes:
        needed_bytes, room_bytes: of the process that lacks most; 0 where it is rows.
        rows: how many more a step would need.
    """

    layout: Layout
    needed_bytes: int = 0
    room_bytes: int = 0
    rows: int = 0

    @property
    def missing_bytes(self) -> int:
        return self.needed_bytes - self.room_bytes


# by the id of a node: seconds of a micro-batch of the first blocks, of their backward, and both of embedding and head
Costs = dict[int, tuple[list[float], list[float], tuple[float, float], tuple[float, float]]]


class Loads:
    """Sums over the blocks of a model as a layout has them.

    Attributes:
        rooms: what a device of each stage has for tensors, in bytes.
        tokens: of a micro-batch.
        micro_batches: of a replica, in an even share.
        kept: bytes that the first blocks keep for a micro-batch.
        costs: of each kind of node, seconds of the first blocks and of the ends; the same for every shard and schedule.
    """

    def __init__(
        self,
        pieces: Pieces,
        placement: Placement,
        layout: Layout,
        row_tokens: int,
        micro_batches: int,
        costs: Costs | None = None,
    ) -> None:
        self.pieces, self.placement, self.layout, self.micro_batches = pieces, placement, layout, micro_batches
        self.rooms = [min(node.room_bytes for node in nodes) for nodes in placement.stages]
        self.tokens = row_tokens * layout.micro_rows
        blocks = pieces.blocks
        self.states = {id(block): block.state(layout.tensor) for block in pieces.kinds}
        each = {key: self.spread(state).total_bytes for key, state in self.states.items()}
        held = [each[id(block)] for block in blocks]
        kept = self.pieces.kept_bytes(self.tokens, layout.tensor, layout.recompute)
        self.held = list(accumulate(held, initial=0))
        self.kept = list(accumulate((kept if block.learns else 0 for block in blocks), initial=0))
        self.again = self.pieces.again_bytes(self.tokens, layout.tensor, layout.recompute)
        self.costs = costs or {id(node): self._costs(node) for nodes in placement.stages for node in nodes}
        # of each stage, by kind of node: seconds of the first blocks, and of what it has besides
        self.curves = [
            [(self.costs[id(node)][0], self.of_node(node, stage, 0, 0)[0]) for node in nodes]
            for stage, nodes in enumerate(placement.stages)
        ]
        # of each stage, what does not depend on its blocks
        self.fixed = [self._fixed(stage) for stage in range(layout.pipeline)]
        self.flights = [in_flight(layout, stage, micro_batches) for stage in range(layout.pipeline)]

    def seconds(self, stage: int, first: int, end: int) -> float:
        """Seconds of a micro-batch, forward and backward, of the slowest replica."""
        return max(whole[end] - whole[first] + ends for whole, ends in self.curves[stage])

    def fitting_seconds(self, stage: int, first: int, end: int) -> float:
        """The same, infinite where it does not fit."""
        return self.seconds(stage, first, end) if self.fits(stage, first, end) else inf

    def of_node(self, node: Node, stage: int, first: int, end: int) -> tuple[float, float]:
        """Seconds of a micro-batch on a kind of node, and of its backward alone."""
        whole, backward, embed, head = self.costs[id(node)]
        both, back = whole[end] - whole[first], backward[end] - backward[first]
        for part, there in ((embed, stage == 0), (head, stage == self.layout.pipeline - 1)):
            both, back = (both + part[0], back + part[1]) if there else (both, back)
        return both, back

    def bytes(self, stage: int, first: int, end: int) -> float:
        """Bytes that one process holds."""
        kept, fixed = self.kept[end] - self.kept[first], self.fixed[stage]
        return self.held[end] - self.held[first] + self.flights[stage] * kept + (self.again if kept else 0) + fixed

    def activations(self, stage: int, first: int, end: int) -> int:
        """Of these, what is kept of micro-batches, made again, or logits."""
        kept = self.kept[end] - self.kept[first]
        return ceil(self.flights[stage] * kept) + (self.again if kept else 0) + self._logits(stage)

    def buffers(self, stage: int) -> int:
        """Whole weights of the part that computes and of the next."""
        if self.layout.shard != "zero3":
            return 0
        largest = max((state.weights_bytes for state in self.states.values()), default=0)
        outer = (part.state(self.layout.tensor).weights_bytes for part in self.outer(stage))
        return 2 * max(largest, *outer, 0)

    def ends(self, stage: int) -> State:
        """What a stage holds besides blocks, before it is spread."""
        found = State()
        for part in self.outer(stage):
            found += part.state(self.layout.tensor)
        if stage == self.layout.pipeline - 1 > 0:
            found += self.pieces.copied.part(self.layout.tensor)
        return found

    def memory(self, stage: int, first: int, end: int) -> StageMemory:
        state = self.spread(self.ends(stage))
        for key, count in Counter(map(id, self.pieces.blocks[first:end])).items():
            state += self.spread(self.states[key]).times(count)
        activations, room = self.activations(stage, first, end), self.rooms[stage]
        return StageMemory(end - first, state, activations, self.buffers(stage), room)

    def whole(self, stage: int, first: int, end: int) -> State:
        """The state of a stage before it is spread over replicas."""
        state = self.ends(stage)
        for key, count in Counter(map(id, self.pieces.blocks[first:end])).items():
            state += self.states[key].times(count)
        return state

    def fits(self, stage: int, first: int, end: int) -> bool:
        return self.bytes(stage, first, end) <= self.rooms[stage]

    def fits_somehow(self) -> bool:
        """Whether any cut fits: it does where all blocks are placed when each stage takes as many as it can."""
        blocks, reached = len(self.pieces.blocks), 0
        for stage in range(self.layout.pipeline):
            if not self.fits(stage, reached, reached):
                return False
            ends = range(reached, blocks + 1)
            reached += bisect_left(ends, True, key=lambda end: not self.fits(stage, reached, end)) - 1
        return reached == blocks

    def lacking(self) -> Lacks:
        """What the fullest stage lacks where blocks are split evenly."""
        blocks, stages = len(self.pieces.blocks), self.layout.pipeline
        cuts = [blocks * stage // stages for stage in range(stages + 1)]
        needs = [ceil(self.bytes(stage, cuts[stage], cuts[stage + 1])) for stage in range(stages)]
        rooms = self.rooms
        worst = max(range(stages), key=lambda stage: needs[stage] - rooms[stage])
        return Lacks(self.layout, needed_bytes=needs[worst], room_bytes=rooms[worst])

    def spread(self, state: State) -> State:
        """What one of the replicas' processes holds of a state."""
        return state.held(self.layout.shard, self.layout.data)

    def outer(self, stage: int) -> list[Part]:
        """What a stage has besides blocks."""
        last = stage == self.layout.pipeline - 1
        return [*([self.pieces.embed] if stage == 0 else []), *([self.pieces.head] if last else [])]

    def _fixed(self, stage: int) -> int:
        return self.spread(self.ends(stage)).total_bytes + self.buffers(stage) + self._logits(stage)

    def _logits(self, stage: int) -> int:
        last = stage == self.layout.pipeline - 1
        return self.pieces.logits_bytes(self.tokens, self.layout.tensor) if last and self.pieces.head.learns else 0

    def _costs(self, node: Node) -> tuple[list[float], list[float], tuple[float, float], tuple[float, float]]:
        known = {id(block): self._part(block, node) for block in self.pieces.kinds}
        blocks = [known[id(block)] for block in self.pieces.blocks]
        whole = list(accumulate((both for both, _ in blocks), initial=0.0))
        backward = list(accumulate((back for _, back in blocks), initial=0.0))
        return whole, backward, self._part(self.pieces.embed, node), self._part(self.pieces.head, node)

    def _part(self, part: Part, node: Node) -> tuple[float, float]:
        """Seconds of a micro-batch, and of its backward: products or the reading of weights, and tensor sums."""
        layout, tokens = self.layout, self.tokens
        # the embedding is looked up, not read
        read = part.state(layout.tensor).weights_bytes / node.memory_bandwidth if part.products else 0.0
        speed = layout.tensor * node.flops
        forward = max(tokens * part.forward_flops() / speed, read)
        backward = max(tokens * part.backward_flops(layout.recompute) / speed, read) if part.learns else 0.0
        if layout.tensor == 1:
            return forward + backward, backward
        buffer = tokens * self.pieces.shape.d_model * self.pieces.item_bytes
        one = links.all_reduce(node.within, layout.tensor, buffer)
        ahead, back = self.reductions(part)
        return forward + backward + (ahead + back) * one, backward + back * one

    def reductions(self, part: Part) -> tuple[int, int]:
        """All-reduces of activations in a tensor group, forward and backward: of embedding and head one each."""
        if part is self.pieces.embed:
            return 1, 0
        if part is self.pieces.head:
            return 0, int(part.learns)
        return 2, tensor_reductions(self.layout.recompute, part.learns) - 2
