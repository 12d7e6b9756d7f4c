"""Writing with any decoder that keeps keys and values: batches padded on the left, through the model's own modules.

Padding is known by the mask and never by an id, a prefix that all prompts share is read once, and rows that have
finished leave. None of it changes what is written. The memory is in `cache.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.cache import SPARE, RowCache
from tunesmith.models.route import Route
from tunesmith.models.soft import PLACEHOLDER, Holes, Layout, Room, layout

# rows leave once this share of the batch has finished: moving the rest costs about one token of all rows
_LEAVE = 0.25


class Padded:
    """Writes rows with a model.

    Args:
        route_of: the route of some rows.
        limit: tokens of a row at most.
        stops: tokens that end a row.
        choose: next tokens, int64 [rows], from logits, the rows' numbers, and how many tokens each has.
    """

    def __init__(
        self,
        model: Any,
        route_of: Callable[[Sequence[int]], Route | None],
        limit: int,
        stops: set[int],
        choose: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor],
    ) -> None:
        self.model, self.route_of = model, route_of
        self.limit, self.stops, self.choose = limit, stops, choose
        self.accepted = set(inspect.signature(model.forward).parameters)

    def turns(
        self, prompts: Sequence[Sequence[int]], order: Sequence[int], size: int, shared: int
    ) -> Iterator[list[tuple[int, int]]]:
        """(row number, token) of each row as it is written, `size` rows at a time, in order.

        Args:
            shared: so many tokens of every prompt are the same; each has more.
        """
        prefix = self._read(list(prompts[order[0]][:shared]), self.route_of(order)) if shared else None
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield from self._batch([list(prompts[row]) for row in rows], rows, prefix)

    def _batch(
        self, prompts: list[list[int]], numbers: Sequence[int], prefix: RowCache | None
    ) -> Iterator[list[tuple[int, int]]]:
        rows = _Rows(self.model, self.route_of(numbers), prompts, prefix, min(self.limit, SPARE))
        numbers, ended = list(numbers), [False] * len(numbers)
        logits = self._forward(rows.ids, rows)
        for turn in range(self.limit):
            tokens = self.choose(logits, numbers, [turn] * len(numbers))
            ids = tokens.tolist()
            yield [(number, token) for number, token, end in zip(numbers, ids, ended, strict=True) if not end]
            ended = [end or token in self.stops for end, token in zip(ended, ids, strict=True)]
            if all(ended) or turn + 1 == self.limit:
                return
            if sum(ended) >= _LEAVE * len(ended) and any(ended):
                staying = [row for row, end in enumerate(ended) if not end]
                rows.keep(staying)
                tokens = tokens[torch.tensor(staying, device=tokens.device)]
                numbers, ended = [numbers[row] for row in staying], [False] * len(staying)
            logits = self._forward(tokens[:, None], rows)

    @torch.no_grad()
    def _forward(self, ids: Tensor, rows: _Rows) -> Tensor:
        """Logits [rows, vocabulary] after ids [rows, new tokens]."""
        inputs: dict[str, Any] = {"input_ids": ids, **rows.advance(ids.shape[1])}
        # as an index: what a slice leaves is not contiguous, and a frozen bfloat16 head is then copied to be multiplied
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        inputs |= {"use_cache": True, "return_dict": True, "logits_to_keep": last}
        with _entered(rows.route), _entered(rows.holes):
            output = self.model(**{name: value for name, value in inputs.items() if name in self.accepted})
        logits: Tensor = output.logits[:, -1]
        return logits

    def _read(self, prefix: list[int], route: Route | None) -> RowCache:
        """The cache of the shared prefix, one row."""
        rows = _Rows(self.model, route, [prefix], None, 0, whole=False)
        self._forward(rows.ids, rows)
        return rows.cache


def _entered(what: Route | Holes | None) -> AbstractContextManager[None]:
    return nullcontext() if what is None else what.enter()


class _Rows:
    """Rows of a batch: what each has read, which columns of the cache are its own, where it stands."""

    def __init__(
        self,
        model: Any,
        route: Route | None,
        prompts: list[list[int]],
        prefix: RowCache | None,
        spare: int,
        whole: bool = True,
    ) -> None:
        device: torch.device = model.device
        self.route = route
        shared = 0 if prefix is None else prefix.get_seq_length()
        room = layout(model, route, [len(prompt) for prompt in prompts])
        rooms = [Room()] * len(prompts) if room is None else list(room.rooms)
        if not whole:  # a prompt goes on behind this, and its infix comes then
            rooms = [replace(one, infix=()) for one in rooms]
        own = [
            [*[PLACEHOLDER] * one.before, *prompt, *[PLACEHOLDER] * one.inside][shared:]
            for one, prompt in zip(rooms, prompts, strict=True)
        ]
        width = max(map(len, own))
        padding = [[0] * (width - len(ids)) for ids in own]
        self.ids = torch.tensor([[*pad, *ids] for pad, ids in zip(padding, own, strict=True)], device=device)
        self.cache = RowCache(spare) if prefix is None else prefix.spread(len(own), width + spare)
        self.spare = spare
        self.seen = torch.ones(len(own), shared + width, dtype=torch.int64, device=device)
        for row, pad in enumerate(padding):
            self.seen[row, shared : shared + len(pad)] = 0
        self.padded = any(padding)
        # position of the next column
        ahead = [one.keys + shared - len(pad) for one, pad in zip(rooms, padding, strict=True)]
        self.ahead = torch.tensor(ahead, device=device)
        self.holes = self._holes(room, rooms, [len(pad) for pad in padding], width, shared)

    def _holes(self, room: Layout | None, rooms: list[Room], pads: list[int], width: int, shared: int) -> Holes | None:
        """Where soft tokens go in the first columns; what the shared prefix holds is written already."""
        if room is None:
            return None
        starts = [row * width + pad - shared for row, pad in enumerate(pads)]
        if shared:
            starts = [start + one.before for start, one in zip(starts, rooms, strict=True)]
            rooms = [replace(one, prefix=()) for one in rooms]
        return replace(room, rooms=tuple(rooms)).holes((len(rooms), width), starts, self.ids.device)

    def advance(self, tokens: int) -> dict[str, Any]:
        """The inputs that go with that many new tokens a row."""
        positions = (self.ahead[:, None] + torch.arange(tokens, device=self.ahead.device)).clamp(min=0)
        self.ahead = self.ahead + tokens
        past = self.cache.get_seq_length()
        if past + tokens > self.seen.shape[1]:
            more = self.seen.new_ones(len(self.seen), past + tokens + SPARE - self.seen.shape[1])
            self.seen = torch.cat([self.seen, more], 1)
        seen = self.seen[:, : past + tokens] if self.padded else None
        return {"position_ids": positions, "attention_mask": seen, "past_key_values": self.cache}

    def keep(self, staying: list[int]) -> None:
        """Drops the other rows, and columns in which the remaining ones have only padding."""
        rows = torch.tensor(staying, device=self.seen.device)
        past = self.cache.get_seq_length()
        seen = self.seen[rows, :past]
        columns = seen.any(0).nonzero()[:, 0]
        self.cache.keep(rows, columns, self.spare)
        self.seen = seen[:, columns]
        self.padded = not bool(self.seen.all())
        self.ahead = self.ahead[rows]
        self.route = self.route if self.route is None else self.route.select(staying)
