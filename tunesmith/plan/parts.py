"""What tensor parallelism and pipelines make of a plan: the bytes that a process holds of its part, and sends.

The one idea: a part is a list of tensors, read off their names, and is counted as a whole model is (`memory.py`); the
processes that share it with other rows are `spread.py`'s. Tensor parallelism sends two sums of activations a block
forward and two backward (Shoeybi et al. 2019, arXiv 1909.08053, section 3), a pipeline states between stages and their
gradients; what nothing trains below needs none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.parallel.layout import LayoutSection
from tunesmith.parallel.stages import idle_share, spans, wanted
from tunesmith.plan.memory import Memory, TensorSpec, count_memory
from tunesmith.plan.plan import Plan
from tunesmith.plan.spread import Spread

_BLOCK = re.compile(r"\blayers\.(\d+)\.(.+)")
_MAP = re.compile(r"(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.(?:(weight|bias)|inserts\.[^.]+\.[^.]+\.([AB]))")
_COLUMNS = ("q", "k", "v", "gate", "up")


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
        sent = max((self.sent_bytes(rank, specs) for rank in range(self.parts)), key=lambda found: sum(found.values()))
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
    def parts(self) -> int:
        """Processes that hold one model together."""
        return self.section.processes // self.section.data

    @property
    def sent_micro_batches(self) -> int:
        """Micro-batches of a step with those that a schedule adds."""
        return wanted(self.micro_batches, self.section)

    def memory(self, whole: Memory, specs: Sequence[TensorSpec]) -> Memory:
        """What the fullest process holds. Activations of a part of a matrix count as the whole's: an upper bound."""
        data = Spread(self.section.data, self.section.shard)
        held = [data.memory(self._counted(self.mine(rank, specs)), specs) for rank in range(self.parts)]
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
        if self.section.pipeline > 1:
            return [spec for spec in specs if rank in {stage % self.parts for stage in self._stages(spec, specs)}]
        found = []
        for spec in specs:
            axis = _axis(spec.name)
            sizes = [size // self.parts if at == axis else size for at, size in enumerate(spec.shape)]
            found.append(replace(spec, shape=tuple(sizes)))
        return found

    def sent_bytes(self, rank: int, specs: Sequence[TensorSpec]) -> dict[str, int]:
        """Bytes that a part sends in a step, by collective."""
        mine = self.mine(rank, specs)
        data = Spread(self.section.data, self.section.shard, self.micro_batches)
        sent = data.sent_bytes(self._counted(mine), mine)
        sent["activations"] = self.activations_sent_bytes(rank, specs)
        share = (self.parts - 1) / self.parts if self.section.tensor > 1 else 1 / 2
        reduced = round(2 * share * self._added_up_bytes(rank, mine, specs))
        if reduced:
            sent["all_reduce"] = sent.get("all_reduce", 0) + reduced
        return sent

    def activations_sent_bytes(self, rank: int, specs: Sequence[TensorSpec]) -> int:
        """Of activations and their gradients."""
        if self.section.tensor > 1:
            each = self.tokens * self.width * self.item_bytes
            return round(2 * (self.parts - 1) / self.parts * each * (2 * self.blocks + self._sums_backward(specs)))
        each = self.sent_micro_batches * self.longest * self.width * self.item_bytes
        last = self.section.stages - 1
        lowest = min(min(self._stages(spec, specs)) for spec in specs if spec.trainable)
        own = [stage for stage in range(last + 1) if stage % self.parts == rank]
        return each * sum((stage < last) + (stage > lowest) for stage in own)

    def _added_up_bytes(self, rank: int, mine: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> int:
        """Gradients in float32 that parts add up: of whole tensors within cut maps, or of a tied weight."""
        trained = [spec for spec in mine if spec.trainable]
        if self.section.tensor > 1:
            return sum(4 * spec.count for spec in trained if _is_shared(spec.name))
        return sum(4 * spec.count for spec in trained if len(self._stages(spec, specs)) > 1)

    def _sums_backward(self, specs: Sequence[TensorSpec]) -> int:
        """Sums of gradients in a backward: into attention and MLP of every block with something to train below."""
        places = [_place(spec.name) for spec in specs if spec.trainable]
        lowest = min(place for place in places if place is not None)
        into = [(block, part) for block in range(self.blocks) for part in (_ATTENTION, _MLP)]
        return sum(lowest < place for place in into)

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
    role, own, factor = found.groups()
    if role in _COLUMNS:
        return 0 if factor != "A" else None
    return 1 if factor != "B" and own != "bias" else None


def _is_shared(name: str) -> bool:
    """Whether a parameter is whole within a map that is cut, or a norm of heads."""
    found = _MAP.search(name)
    if found is None:
        return ".self_attn." in name and "norm" in name
    return _axis(name) is None
