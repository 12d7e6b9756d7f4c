"""Beginnings that documents of a batch share, computed once: their states serve all, their gradients add up.

The one idea: a token's state owes nothing to what follows it, so documents that begin with the same tokens have the
same states there. A group's beginning becomes one segment, the rest of each document one that goes on from it
(`route.Segments`); on the way back each of the caller's tokens finds its state. Who asks for states never notices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.core.context import holding
from tunesmith.core.switches import on
from tunesmith.models.attention import is_heard
from tunesmith.models.families import setting
from tunesmith.models.inserts import Insert
from tunesmith.models.ports import is_watched
from tunesmith.models.route import Segments

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.policy import Policy

# what a group, and what all groups together, have to save before they are worth the bookkeeping
LEAST_TOKENS = 16
LEAST_SHARE = 0.03
_WIDTH = 8  # bytes of an id


@dataclass(frozen=True)
class Group:
    """Documents, by number, that share so many tokens at their beginning."""

    documents: tuple[int, ...]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return (len(self.documents) - 1) * self.length


@dataclass(frozen=True)
class Compact:
    """A batch as it is computed, each shared beginning once.

    Attributes:
        tokens: int64 [computed], which of the batch's tokens each is.
        places: int64 [tokens of the batch], where each is computed.
        segments: how what is computed is laid out.
        owners: a document that each segment is of.
    """

    tokens: Tensor
    places: Tensor
    segments: Segments
    owners: tuple[int, ...]

    def part(self, batch: Batch) -> Batch:
        """What is computed of a batch, with nothing supervised."""
        none = self.tokens.new_zeros(0)
        return replace(
            batch,
            ids=batch.ids[self.tokens],
            positions=batch.positions[self.tokens],
            lengths=self.segments.lengths,
            sources=none,
            targets=none,
            rows=tuple(batch.rows[owner] for owner in self.owners),
            labels=None,
            prompts=(),
            answers=(),
            ranks=None,
        )

    def states(self, run: Callable[[Tensor | None], Tensor], wanted: Tensor | None) -> Tensor:
        """The states of the batch's tokens, or of some, from those of what is computed.

        Args:
            run: answers the states at some places of what is computed, of all for None.
        """
        if wanted is None:
            return taken(run(None), self.places)
        places = self.places[wanted]
        once, numbers = torch.unique(places, return_inverse=True)
        return run(places) if len(once) == len(places) else taken(run(once), numbers)


_foreseen: ContextVar[Compact | None] = ContextVar("tunesmith_foreseen", default=None)


def foreseen(compact: Compact | None) -> AbstractContextManager[None]:
    """Tells what was found of a batch whose numbers are not there within: a plan's."""
    return holding(_foreseen, compact)


def compacted(policy: Policy, batch: Batch) -> Compact | None:
    """How a batch is computed with each shared beginning once; None where that saves too little or is not exact."""
    known = _foreseen.get()
    if known is not None and len(known.places) == len(batch.ids):
        return known
    if not on("shared_prefix") or len(batch.lengths) < 2 or not _takes(policy, batch):
        return None
    route = policy.route
    groups = shared(batch.ids, batch.lengths, [route.of(row) for row in range(len(batch.lengths))])
    if sum(group.saved for group in groups) < LEAST_SHARE * sum(batch.lengths) or not _is_even(policy.model):
        return None
    return _laid_out(groups, batch)


def shared(ids: Tensor, lengths: Sequence[int], kinds: Sequence[Hashable] | None = None) -> list[Group]:
    """Groups of documents with a common beginning; every document is in one at most.

    Found from the longest common beginnings to the shortest, so that they save as much as one level of sharing can
    (but for rare nestings); n log n comparisons.

    Args:
        ids: int64 [tokens], documents end to end.
        kinds: only documents of the same kind can share anything; by default all.
    """
    data, held, start = ids.cpu().numpy().tobytes(), [], 0
    for length in lengths:
        held.append(data[start : start + _WIDTH * length])
        start += _WIDTH * length
    alike: dict[Hashable, list[int]] = {}
    for number in range(len(held)):
        alike.setdefault(kinds[number] if kinds is not None else None, []).append(number)
    found = [group for numbers in alike.values() for group in _best(held, sorted(numbers, key=held.__getitem__))]
    return sorted(found, key=lambda group: group.documents)


@dataclass(eq=False)
class _Node:
    """Documents with a common beginning of `length` tokens: the best groups among them so far, and those in none."""

    length: int
    free: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def add(self, child: _Node) -> None:
        """Takes what a longer beginning has found."""
        self.free += child.free
        self.groups += child.groups

    def close(self) -> _Node:
        """Makes a group of what is free and of groups that would save more here, if that is worth it."""
        given_up = [group for group in self.groups if group.saved < len(group.documents) * self.length]
        members = [*self.free, *(number for group in given_up for number in group.documents)]
        own = Group(tuple(sorted(members)), self.length)
        if own.saved - sum(group.saved for group in given_up) >= LEAST_TOKENS:
            self.groups = [own, *(group for group in self.groups if group not in given_up)]
            self.free = []
        return self


def _best(held: Sequence[bytes], order: Sequence[int]) -> list[Group]:
    """The groups of documents in the order of their bytes: nodes of the tree of beginnings, closed from the leaves."""
    stack: list[_Node] = []
    for place, number in enumerate(order):
        last = place + 1 == len(order)
        length = -1 if last else _common(held[number], held[order[place + 1]])
        node = _Node(len(held[number]) // _WIDTH, [number])
        while stack and stack[-1].length > length:
            stack[-1].add(node)
            node = stack.pop().close()
        if stack and stack[-1].length == length:
            stack[-1].add(node)
        else:
            stack.append(_Node(length, node.free, node.groups))
    return stack[0].groups if stack else []


def _common(one: bytes, other: bytes) -> int:
    """Ids that two documents begin with alike."""
    low, high = 0, min(len(one), len(other)) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if other.startswith(one[: middle * _WIDTH]):
            low = middle
        else:
            high = middle - 1
    return low


def _laid_out(groups: Sequence[Group], batch: Batch) -> Compact:
    group_of = {number: group for group in groups for number in group.documents}
    pieces: list[tuple[int, int, int, int | None]] = []  # a document, first and end token, the piece it goes on from
    begun: dict[Group, int] = {}
    order: list[int] = []  # of pieces in the batch
    end = 0
    for number, length in enumerate(batch.lengths):
        start, end, prefix = end, end + length, None
        group = group_of.get(number)
        if group is not None:
            if group not in begun:
                begun[group] = len(pieces)
                pieces.append((number, start, start + group.length, None))
            prefix = begun[group]
            order.append(prefix)
            start += group.length
        if start < end:  # else the document is but the beginning
            order.append(len(pieces))
            pieces.append((number, start, end, prefix))
    owners, firsts, ends, prefixes = zip(*pieces, strict=True)
    lengths = tuple(end - first for first, end in zip(firsts, ends, strict=True))
    numbers = torch.arange(end)
    tokens = torch.cat([numbers[first:end] for first, end in zip(firsts, ends, strict=True)])
    computed = numbers[: len(tokens)].split(lengths)
    places = torch.cat([computed[piece] for piece in order])
    device = batch.ids.device
    return Compact(tokens.to(device), places.to(device), Segments(lengths, prefixes), owners)


def taken(found: Tensor, places: Tensor) -> Tensor:
    """found[places], the gradients of what is taken several times summed in float32 or wider, in a fixed order."""
    wide = found.to(torch.promote_types(found.dtype, torch.float32))
    # indexing is deterministic on an accelerator, selecting on a CPU
    taken = wide.index_select(0, places) if found.device.type == "cpu" else wide[places]
    return taken.to(found.dtype)


def _takes(policy: Policy, batch: Batch) -> bool:
    """Whether a state depends on nothing but the tokens up to its own, as far as that can be told at once."""
    config = policy.config
    window = setting(config, "sliding_window")
    if policy.family.kind != "decoder" or not policy.packed or batch.types is not None or is_heard():
        return False
    if window is not None and window < max(batch.lengths):
        return False
    # numbers are looked at, which a plan has none of
    plain = type(batch.ids) is Tensor and batch.ids.device.type != "meta"
    return plain and torch._C._functorch.peek_interpreter_stack() is None


def _is_even(model: nn.Module) -> bool:
    """Whether all documents are treated alike and nobody looks on: no dropout that acts, no hooks, causal attention."""
    for module in model.modules():
        if is_watched(module):
            return False
        held: dict[str, Any] = vars(module)
        if held.get("is_causal") is False:
            return False
        if drops(module):
            return False
    return True


def drops(module: nn.Module) -> bool:
    """Whether dropout acts in a module itself, as far as its attributes tell."""
    held: dict[str, Any] = vars(module)
    if not module.training:
        return False
    if _names_a_share(held) or (isinstance(module, Insert) and _names_a_share(vars(module.method))):
        return True
    return "Dropout" in type(module).__name__ and held.get("p", 1.0) > 0


def _names_a_share(held: dict[str, Any]) -> bool:
    """Whether something here is called a dropout and is not zero."""
    for name, value in held.items():
        if "drop" in name:
            shares = value.values() if isinstance(value, dict) else (value,)
            if any(isinstance(share, float | int) and share > 0 for share in shares):
                return True
    return False
