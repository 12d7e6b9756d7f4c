"""A model as a pipeline cuts it: the embedding, the blocks, the head; what each weighs, multiplies and keeps.

The one idea: states are summed from the tensors of the real adapted model (`memory.TensorSpec`); only what tensors do
not say, activations and attention, comes from the shape. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from tunesmith.parallel.layout import Shard
from tunesmith.plan.memory import TensorSpec
from tunesmith.plan.shape import ModelShape

_LEVELS: dict[Shard, int] = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class State:
    """Bytes that do not depend on the batch.

    Attributes:
        weights_bytes: in what they compute in.
        lowered_bytes: of these, trained ones that have masters: where weights are spread, the masters alone are held.
        master_bytes, gradients_bytes, optimizer_bytes: of what trains.
        trained_bytes: of the weights, trained ones.
    """

    weights_bytes: int = 0
    lowered_bytes: int = 0
    master_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    trained_bytes: int = 0

    def __add__(self, other: State) -> State:
        return State(
            self.weights_bytes + other.weights_bytes,
            self.lowered_bytes + other.lowered_bytes,
            self.master_bytes + other.master_bytes,
            self.gradients_bytes + other.gradients_bytes,
            self.optimizer_bytes + other.optimizer_bytes,
            self.trained_bytes + other.trained_bytes,
        )

    def times(self, count: int) -> State:
        """So many of it."""
        return self._each(lambda value: value * count)

    def part(self, ways: int) -> State:
        """One of so many equal parts."""
        return self if ways == 1 else self._each(lambda value: -(-value // ways))

    def _each(self, change: Callable[[int], int]) -> State:
        return State(
            change(self.weights_bytes),
            change(self.lowered_bytes),
            change(self.master_bytes),
            change(self.gradients_bytes),
            change(self.optimizer_bytes),
            change(self.trained_bytes),
        )

    def held(self, shard: Shard, data: int) -> State:
        """What one of `data` processes holds of it (Rajbhandari et al. 2020, arXiv 1910.02054, section 5)."""
        level, part = _LEVELS[shard], self.part(data)
        weights = -(-(self.weights_bytes - self.lowered_bytes) // data) if level >= 3 else self.weights_bytes
        return State(
            weights_bytes=weights,
            lowered_bytes=0 if level >= 3 else self.lowered_bytes,
            master_bytes=part.master_bytes if level >= 1 else self.master_bytes,
            gradients_bytes=part.gradients_bytes if level >= 2 else self.gradients_bytes,
            optimizer_bytes=part.optimizer_bytes if level >= 1 else self.optimizer_bytes,
            trained_bytes=part.trained_bytes if level >= 1 else self.trained_bytes,
        )

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.master_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Part:
    """The embedding, one block, or the head.

    Attributes:
        split: what a tensor group splits: matrices of the base model.
        whole: what each of its processes holds: norms, biases, and what an adapter adds.
        products: numbers that every token is multiplied by.
        trained_products: of these, those whose gradient is wanted.
        again_products: of these, those that `selective` multiplies once more in the backward.
        score_flops: of attention in the forward, for each token.
        learns: something in it, or below it, trains: it has a backward and keeps what that needs.
        passes: something below it trains: its backward hands gradients down.
    """

    split: State = State()
    whole: State = State()
    products: int = 0
    trained_products: int = 0
    again_products: int = 0
    score_flops: float = 0.0
    learns: bool = True
    passes: bool = True

    def state(self, tensor: int) -> State:
        """What one process of a tensor group holds."""
        return self.split.part(tensor) + self.whole

    def forward_flops(self) -> float:
        """For each token, over all processes of a tensor group."""
        return 2.0 * self.products + self.score_flops

    def backward_flops(self, recompute: str) -> float:
        """For each token; scores are computed again in the backward (Dao et al. 2022, arXiv 2205.14135)."""
        if not self.learns:
            return 0.0
        again = {"none": 0.0, "selective": 2.0 * self.again_products, "full": self.forward_flops()}[recompute]
        down = 2.0 * self.products if self.passes else 0.0
        return down + 2.0 * self.trained_products + 2.5 * self.score_flops + again

    def useful_flops(self) -> float:
        """For each token: nothing twice, as utilisation counts it (Chowdhery et al. 2022, arXiv 2204.02311, app. B)."""
        down = 2.0 * self.products if self.passes else 0.0
        backward = down + 2.0 * self.trained_products + 2.0 * self.score_flops
        return self.forward_flops() + (backward if self.learns else 0.0)


@dataclass(frozen=True)
class Pieces:
    """The parts of a model, and its sizes.

    Attributes:
        shape: for activations.
        copied: the embedding's table, where the head is the same one: another stage holds a copy.
        item_bytes: of an activation.
    """

    shape: ModelShape
    embed: Part
    blocks: tuple[Part, ...]
    head: Part
    copied: State = State()
    item_bytes: int = 2

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.embed, *self.blocks, self.head)

    @property
    def kinds(self) -> list[Part]:
        """The blocks that are not one and the same object."""
        return list({id(block): block for block in self.blocks}.values())

    @property
    def useful_flops(self) -> float:
        """For each token."""
        return sum(part.useful_flops() for part in self.parts)

    def kept_bytes(self, tokens: int, tensor: int, recompute: str) -> int:
        """What a block keeps for its backward of so many tokens, on one process of a tensor group.

        Counts what `memory.estimate_activations` counts; a tensor group splits what lies within attention and MLP and
        repeats what lies between them (Korthikanti et al. 2022, arXiv 2205.05198, equation 2).
        """
        shape, width = self.shape, self.shape.n_heads * self.shape.d_head
        if recompute == "full":
            return tokens * self.item_bytes * shape.d_model
        split = shape.d_model + width + 2 * shape.n_kv_heads * shape.d_head
        split += 0 if recompute == "selective" else (4 if shape.gated else 2) * shape.d_mlp
        return tokens * self.item_bytes * (6 * shape.d_model + -(-split // tensor))

    def again_bytes(self, tokens: int, tensor: int, recompute: str) -> int:
        """What the one block has at a time that is made again."""
        return self.kept_bytes(tokens, tensor, "none") - self.kept_bytes(tokens, tensor, recompute)

    def logits_bytes(self, tokens: int, tensor: int, chunk: int = 128) -> int:
        """Two float32 copies of the logits of one chunk of the head."""
        return min(tokens, chunk) * -(-self.shape.vocab // tensor) * 4 * 2 if self.head.products else 0


def pieces_of(
    specs: Sequence[TensorSpec],
    shape: ModelShape,
    *,
    blocks: Sequence[str],
    base: Collection[str],
    context: float,
    head: bool = True,
    master: bool = True,
) -> Pieces:
    """The parts of an adapted model.

    Args:
        specs: its tensors, in the order of the model: what comes before the first block is the embedding's, what
            comes after it and is in none is the head's.
        blocks: paths of the blocks.
        base: names of the base model's own parameters.
        context: tokens of the document that a token lies in.
        head: there are logits over the vocabulary.
        master: trained weights of fewer than 32 bits have float32 masters, and gradients in float32.
    """
    places = [_place(spec.name, blocks) for spec in specs]
    first = next((index for index, place in enumerate(places) if place is not None), len(places))
    groups: dict[int, list[TensorSpec]] = {index: [] for index in range(-1, len(blocks) + 1)}
    for index, (spec, place) in enumerate(zip(specs, places, strict=True)):
        groups[place if place is not None else -1 if index < first else len(blocks)].append(spec)
    lowest = next((index for index, group in groups.items() if any(spec.trainable for spec in group)), len(blocks) + 1)
    scores = 4.0 * shape.n_heads * shape.d_head * context
    again = shape.d_model * shape.d_mlp * (2 if shape.gated else 1)
    found = []
    for index, group in groups.items():
        inner = 0 <= index < len(blocks)
        matrices = [spec for spec in group if inner and len(spec.shape) == 2 and not spec.buffer]
        logits = shape.head_parameters if head and index == len(blocks) else 0
        trained_head = any(spec.trainable and spec.name in base and len(spec.shape) == 2 for spec in group)
        found.append(
            Part(
                split=_state([spec for spec in group if _is_split(spec, base)], master),
                whole=_state([spec for spec in group if not _is_split(spec, base)], master),
                products=sum(spec.count for spec in matrices) + logits,
                trained_products=sum(spec.count for spec in matrices if spec.trainable)
                + (logits if trained_head else 0),
                again_products=again if inner else 0,
                score_flops=scores if inner else 0.0,
                learns=index >= lowest,
                passes=index > lowest,
            )
        )
    tied = [spec for spec in groups[-1] if spec.count == shape.head_parameters] if shape.tied and head else []
    copied = _state(tied[:1], master)
    if tied and tied[0].trainable:
        # the table is multiplied by as the head, and learns from that, too
        found[-1] = replace(found[-1], trained_products=shape.head_parameters)
    alike: dict[Part, Part] = {}  # equal blocks are one object, so that what follows from one is found once
    return Pieces(shape, found[0], tuple(alike.setdefault(block, block) for block in found[1:-1]), found[-1], copied)


def _place(name: str, blocks: Sequence[str]) -> int | None:
    return next((index for index, path in enumerate(blocks) if name.startswith(path + ".")), None)


def _is_split(spec: TensorSpec, base: Collection[str]) -> bool:
    return spec.name in base and len(spec.shape) == 2


def _state(specs: Sequence[TensorSpec], master: bool) -> State:
    trained = [spec for spec in specs if spec.trainable]
    low = [spec for spec in trained if spec.item_bytes < 4] if master else []
    return State(
        weights_bytes=sum(spec.nbytes for spec in specs),
        lowered_bytes=sum(spec.nbytes for spec in low),
        master_bytes=sum(4 * spec.count for spec in low),
        gradients_bytes=sum(spec.count * (4 if master else spec.item_bytes) for spec in trained),
        optimizer_bytes=sum(8 * spec.count for spec in trained),
        trained_bytes=sum(spec.nbytes for spec in trained),
    )
