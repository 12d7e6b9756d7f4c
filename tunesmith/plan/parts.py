"""What tensor parallelism and pipelines make of a plan: the bytes that a process holds of its part, and sends.

The one idea: a part is a list of tensors, read off their names, and is counted as a whole model is (`memory.py`); the
processes that share it with other rows are `spread.py`'s. Tensor parallelism sends two sums of activations a block
forward and two backward (Shoeybi et al. 2019, arXiv 1909.08053, section 3), a pipeline states between stages and their
gradients; what nothing trains below needs none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.stages import idle_share, spans, wanted
from tunesmith.parallel.tensor import INSERTS, ON_PARTS, ROWS
from tunesmith.plan.memory import Memory, TensorSpec, count_memory
from tunesmith.plan.plan import Plan
from tunesmith.plan.spread import Spread

_BLOCK = re.compile(r"\blayers\.(\d+)\.(.+)")
_MAP = re.compile(r"(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.(?:(weight|bias)|inserts\.[^.]+\.[^.]+\.(\w+))$")


@dataclass(frozen=True)
class PartsSpread:
    """A layout with parts, as a plan needs it.

    Attributes:
        section: the layout.
        blocks, width, item_bytes: of the model; the last is of a number of its activations.
        micro_batches: of a step, of one process.
        tokens: of a step, of one process.
        longest: tokens of its largest micro-batch, as long as which a pipeline makes all.
        master: as `make_plan` has it.
    """

    section: LayoutSection
    blocks: int
    width: int
    item_bytes: int
    micro_batches: int
    tokens: int
    longest: int
    master: bool = True

    def applied(self, plan: Plan, specs: Sequence[TensorSpec]) -> Plan:
        """The plan of the process that holds most; `seconds` as if each had a machine like this one, without
        communication, with what a pipeline waits."""
        section = self.section
        ranks = range(section.parts)
        sent = max((self.sent_bytes(rank, specs) for rank in ranks), key=lambda found: sum(found.values()))
        told: dict[str, Any] = {
            "processes": section.processes,
            "shard": section.shard,
            "tensor": section.tensor,
            "pipeline": section.pipeline,
            "micro_batches": self.micro_batches,
            "sent_bytes": sum(sent.values()),
            **{f"{kind}_sent_bytes": count for kind, count in sent.items()},
        }
        idle = idle_share(section, self.sent_micro_batches) if section.pipeline > 1 else 0.0
        if section.pipeline > 1:
            told["least_idle_share"] = round(idle, 4)
        seconds = None if plan.seconds is None else plan.seconds / section.processes / (1 - idle)
        return replace(plan, memory=self.memory(plan.memory, specs), seconds=seconds, layout=told)

    @property
    def sent_micro_batches(self) -> int:
        """Micro-batches of a step with those that a schedule adds."""
        return wanted(self.micro_batches, self.section)

    def memory(self, whole: Memory, specs: Sequence[TensorSpec]) -> Memory:
        """What the fullest process holds. Activations of a part of a matrix count as the whole's: an upper bound."""
        data = Spread(self.section.data, self.section.shard)
        parts = [self.mine(rank, specs) for rank in range(self.section.parts)]
        held = [data.memory(self._counted(mine), mine) for mine in parts]
        fullest = max(held, key=lambda memory: memory.state_bytes)
        if self.section.pipeline == 1:
            saved = whole.state_bytes - fullest.state_bytes
            peak = max(whole.peak_bytes - saved, fullest.state_bytes) if whole.peak_bytes else 0
            return replace(fullest, activations_bytes=whole.activations_bytes, peak_bytes=peak)
        # every process has so many micro-batches under way, of its share of the blocks
        under_way = self.sent_micro_batches
        if self.section.schedule != "gpipe":
            under_way = min(under_way, self.section.stages)
        activations = -(-whole.activations_bytes // self.section.pipeline) * under_way
        return replace(fullest, activations_bytes=activations, peak_bytes=fullest.state_bytes + activations)

    def mine(self, rank: int, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """The tensors of a part."""
        own, found = self._own(rank), []
        for spec in specs:
            if not self._stages(spec, specs) & own:
                continue
            axis = _axis(spec.name) if self.section.tensor > 1 else None
            sizes = [size // self.section.tensor if at == axis else size for at, size in enumerate(spec.shape)]
            found.append(replace(spec, shape=tuple(sizes)))
        return found

    def sent_bytes(self, rank: int, specs: Sequence[TensorSpec]) -> dict[str, int]:
        """Bytes that a part sends in a step, by collective."""
        mine = self.mine(rank, specs)
        data = Spread(self.section.data, self.section.shard, self.sent_micro_batches)
        sent = data.sent_bytes(self._counted(mine), mine)
        sent["activations"] = self.activations_sent_bytes(rank, specs)
        reduced = round(self._added_up_bytes(mine, specs))
        if reduced:
            sent["all_reduce"] = sent.get("all_reduce", 0) + reduced
        return sent

    def activations_sent_bytes(self, rank: int, specs: Sequence[TensorSpec]) -> int:
        """Of activations and their gradients."""
        # a pipeline makes micro-batches equally long
        tokens = self.sent_micro_batches * self.longest if self.section.pipeline > 1 else self.tokens
        each, own, last = tokens * self.width * self.item_bytes, self._own(rank), self.section.stages - 1
        lowest = min(min(self._stages(spec, specs)) for spec in specs if spec.trainable)
        between = sum((stage < last) + (stage > lowest) for stage in own)
        return each * between + round(2 * self._leaves(self.section.tensor) * each * self._sums(own, specs))

    def _own(self, rank: int) -> set[int]:
        """The stages of a part; those with the same stages are side by side."""
        place = rank // self.section.tensor
        return {stage for stage in range(self.section.stages) if stage % self.section.pipeline == place}

    @staticmethod
    def _leaves(size: int) -> float:
        """The share of a buffer that leaves a process when so many scatter its sums or gather it."""
        return (size - 1) / size

    def _added_up_bytes(self, mine: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> float:
        """Sent to add up gradients in float32 over parts: of whole tensors within cut maps, and of a tied weight.
        Where replicas split their state, these are of its pieces."""
        trained = [spec for spec in mine if spec.trainable]
        within = sum(spec.count for spec in trained if _is_shared(spec.name))
        tied = sum(spec.count for spec in trained if len(self._stages(spec, specs)) > 1)
        pieces = 1 if self.section.shard == "none" else self.section.data
        return 2 * 4 * (self._leaves(self.section.tensor) * within + self._leaves(2) * tied) / pieces

    def _sums(self, own: Collection[int], specs: Sequence[TensorSpec]) -> int:
        """Sums of activations in the blocks of some stages: two of each forward, and backward those into attention and
        MLP with something to train below."""
        held = spans(self.blocks, self.section.stages)
        blocks = [block for block in range(self.blocks) if any(held[stage].holds(block) for stage in own)]
        places = [_place(spec.name) for spec in specs if spec.trainable]
        lowest = min((place for place in places if place is not None), default=(self.blocks, _BEFORE))
        into = [(block, part) for block in blocks for part in (_ATTENTION, _MLP)]
        return 2 * len(blocks) + sum(lowest < place for place in into)

    def _stages(self, spec: TensorSpec, specs: Sequence[TensorSpec]) -> set[int]:
        block, last = _BLOCK.search(spec.name), self.section.stages - 1
        if block:
            held = spans(self.blocks, self.section.stages)
            return {next(stage for stage, span in enumerate(held) if span.holds(int(block.group(1))))}
        if "embed_tokens" not in spec.name:
            return {last}
        is_tied = spec.name.endswith("embed_tokens.weight") and not any("lm_head.weight" in one.name for one in specs)
        return {0, last} if is_tied else {0}

    def _counted(self, specs: Sequence[TensorSpec]) -> Memory:
        return count_memory(list(specs), master=self.master, fp32_gradients=True)


# the places in a block in the order in which they are computed
_BEFORE, _ATTENTION, _WITHIN, _MLP, _BEHIND = range(5)


def _place(name: str) -> tuple[int, int] | None:
    """Where a parameter acts: its block and the place in it; None for what lies behind all blocks."""
    found = _BLOCK.search(name)
    if found is None:
        return (-1, _BEFORE) if "embed_tokens" in name else None
    inner = found.group(2)
    if inner.startswith("input_layernorm"):
        return int(found.group(1)), _BEFORE
    is_behind = inner.startswith(("mlp", "post_feedforward"))
    return int(found.group(1)), _BEHIND if is_behind else _WITHIN


def _axis(name: str) -> int | None:
    """The axis along which a parameter of a block is cut; None where it is whole."""
    found = _MAP.search(name)
    if found is None:
        return None
    role, own, inserted = found.groups()
    side = int(role in ROWS)
    if own is None:
        return INSERTS.get(inserted, (None, None))[side]
    return side if own == "weight" or not side else None


def _is_shared(name: str) -> bool:
    """Whether a parameter is whole and acts on parts: within a map that is cut, or as a norm of heads."""
    found = _MAP.search(name)
    if found is None:
        return ".self_attn." in name and "norm" in name
    return found.group(3) in ON_PARTS and _axis(name) is None
