"""Rows that are written at the same time, and those that wait: whoever has finished makes room for the next at once.

Keys and values lie in pages, which rows take as they grow and give back when they end. What all prompts begin with
lies in pages that are every row's, read once; a prompt that several rows have is read once, too. A row's tokens depend
on that row alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels import few
from tunesmith.kernels.attention import attention
from tunesmith.kernels.build import usable
from tunesmith.kernels.packed import Arena, can_tile
from tunesmith.kernels.paged import PAGE, Pages, keep
from tunesmith.kernels.paged import attention as paged_attention
from tunesmith.models.decode import OFTEN, Decoder, Rows
from tunesmith.models.step import Step

# tokens of prompts that are read in one pass, but for a prompt that is longer
_READ = 2048
# rows that wait come in when one place in so many is free
_LEAVE = 8
Turn = list[tuple[int, int]]  # row numbers and tokens


@dataclass
class _Row:
    """A row that is written: its number, its pages, tokens in them, those written, and the last one, not yet in."""

    number: int
    pages: list[int]
    tokens: int
    written: int = 0
    last: int = 0

    def place(self, token: int) -> int:
        """Where the keys and values of one of its tokens are: number of the page x PAGE + number in it."""
        return self.pages[token // PAGE] * PAGE + token % PAGE


@dataclass
class _Begun:
    """What all prompts begin with: full pages, which rows share, and keys and values of all of it by layer."""

    tokens: int
    pages: list[int]
    states: list[tuple[Tensor, Tensor]]


class Running:
    """Writes rows with a decoder.

    Args:
        limit: tokens of a row at most.
        stops: tokens that end a row.
        choose: next tokens, int64 [rows], from logits, the rows' numbers, and how many tokens each has.
    """

    def __init__(
        self,
        decoder: Decoder,
        limit: int,
        stops: set[int],
        choose: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor],
    ) -> None:
        self.decoder, self.limit, self.stops, self.choose = decoder, limit, stops, choose
        self.store = [Pages.empty(0, decoder.kv, decoder.width, decoder.dtype) for _ in range(decoder.layers)]
        self.free: list[int] = []
        self.rows: list[_Row] = []
        self.begun = _Begun(0, [], [])
        self.table = torch.empty(0, 0, dtype=torch.int32)
        self.documents = decoder.rows([], [])
        self.size = self.longest = self.often = 0
        self.steps: dict[bool, Step] = {}  # for few rows, for more
        self.settled = False  # whether the table is that of the rows

    def turns(self, prompts: Sequence[Sequence[int]], order: Sequence[int], size: int, shared: int) -> Iterator[Turn]:
        """(row number, token) of each row as it is written, at most `size` rows at a time, begun in order.

        Args:
            shared: so many tokens of every prompt are the same; each has more.
        """
        if not order:
            return
        waiting = deque(order)
        longest = sorted((-(-(len(prompts[row]) + self.limit) // PAGE) for row in order), reverse=True)[:size]
        self.size, self.longest = len(longest), longest[0]
        self._reserve(sum(longest) + 1)  # memory that nobody has written to costs nothing
        if shared:
            self._begin(prompts[waiting[0]][:shared], waiting[0])
        while waiting or self.rows:
            # a few at a time: reading a prompt alone costs more than a place that is empty for some tokens
            while waiting and (not self.rows or size - len(self.rows) >= max(1, size // _LEAVE)):
                yield self._ended(self._read(prompts, self._next(prompts, waiting, size)))
            if self.rows:
                yield self._ended(self._write())

    def _next(self, prompts: Sequence[Sequence[int]], waiting: deque[int], size: int) -> list[int]:
        """Rows to be read in one pass."""
        found: list[int] = []
        tokens = 0
        while waiting and len(self.rows) + len(found) < size:
            again = found and prompts[found[-1]] == prompts[waiting[0]]
            tokens += 0 if again else len(prompts[waiting[0]]) - self.begun.tokens
            if found and tokens > _READ:
                break
            found.append(waiting.popleft())
        return found

    @torch.no_grad()
    def _begin(self, prompt: Sequence[int], number: int) -> None:
        """Reads what all prompts begin with, under the route of one of them: it is that of all."""
        row = _Row(number, self._take(len(prompt) // PAGE + 1), 0)
        states: list[tuple[Tensor, Tensor]] = []
        self._forward([row], [prompt], [0], states)
        full = len(prompt) // PAGE
        self.begun = _Begun(len(prompt), row.pages[:full], states)
        self._give(row.pages[full:])

    @torch.no_grad()
    def _read(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> Turn:
        """Lets rows begin; their first tokens."""
        begun = self.begun
        fresh = []
        for number in numbers:
            own = -(-(len(prompts[number]) + 1) // PAGE) - len(begun.pages)
            fresh.append(_Row(number, [*begun.pages, *self._take(own)], begun.tokens))
        self._take_over(fresh)
        found: dict[tuple[Any, ...], int] = {}
        alike = [(tuple(prompts[number]), self.decoder.acting.of(number)) for number in numbers]
        owners = [found.setdefault(key, len(found)) for key in alike]
        states, rows = self._forward(fresh, [prompt[begun.tokens :] for prompt, _ in found], owners)
        ends = torch.tensor(rows.lengths).cumsum(0) - 1
        self.rows += fresh
        self.settled = False
        return self._chosen(fresh, self.decoder.logits(states[ends], rows)[owners])

    def _take_over(self, rows: Sequence[_Row]) -> None:
        """Puts the end of what all begin with, which fills no page, into a page of each row."""
        start = len(self.begun.pages) * PAGE
        if start == self.begun.tokens:
            return
        count = self.begun.tokens - start
        places = [row.pages[len(self.begun.pages)] * PAGE + token for row in rows for token in range(count)]
        at = torch.tensor(places)
        for pages, (k, v) in zip(self.store, self.begun.states, strict=True):
            keep(pages, k[start:].repeat(len(rows), 1, 1), v[start:].repeat(len(rows), 1, 1), at)

    def _forward(
        self,
        fresh: Sequence[_Row],
        texts: Sequence[Sequence[int]],
        owners: Sequence[int],
        hear: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Rows]:
        """States after texts that rows go on with, whose keys and values are kept then; `hear` gets these as well.

        Args:
            owners: which of the texts each row has.
        """
        decoder, before = self.decoder, self.begun.tokens
        lengths = list(map(len, texts))
        rows = decoder.rows([fresh[owners.index(text)].number for text in range(len(texts))], lengths)
        places = [
            row.place(before + token) for row, text in zip(fresh, owners, strict=True) for token in range(lengths[text])
        ]
        tokens = torch.arange(sum(lengths)).split(lengths)
        taken = torch.cat([tokens[text] for text in owners]) if len(fresh) > len(texts) else slice(None)
        ids = torch.tensor([token for text in texts for token in text])
        positions = torch.cat([torch.arange(before, before + count) for count in lengths])
        spans, at = _spans(lengths, before), torch.tensor(places)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(self.store[layer], k[taken], v[taken], at)
            if hear is not None:
                hear.append((k, v))
            if before:
                first = self.begun.states[layer]
                k, v = torch.cat([first[0], k]), torch.cat([first[1], v])
            window, cap = decoder.windows[layer], decoder.caps[layer]
            return attention(q, k, v, spans, scale=decoder.scale, window=window, cap=cap)

        states = decoder.states(ids, positions, rows, attend)
        for row, text in zip(fresh, owners, strict=True):
            row.tokens += lengths[text]
        return states, rows

    @torch.no_grad()
    def _write(self) -> Turn:
        """A token more of every row."""
        decoder, active = self.decoder, self.rows
        for row in active:
            if row.tokens == len(row.pages) * PAGE:
                row.pages += self._take(1)
                self.settled = False
        self._settle()
        counts = [row.tokens for row in active]
        positions, seen = torch.tensor(counts), torch.tensor([count + 1 for count in counts], dtype=torch.int32)
        at = torch.tensor([row.place(row.tokens) for row in active])

        ids = torch.tensor([row.last for row in active])
        step = self._step(len(active))
        if step is not None:
            logits = step(ids, positions, at, seen, self.table, self.documents)
        else:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                pages = self.store[layer]
                keep(pages, k, v, at)
                window, cap = decoder.windows[layer], decoder.caps[layer]
                return paged_attention(q, pages, self.table, seen, decoder.scale, window, cap)

            logits = decoder.logits(decoder.states(ids, positions, self.documents, attend), self.documents)
        for row in active:
            row.tokens += 1
        return self._chosen(active, logits)

    def _step(self, rows: int) -> Step | None:
        """How a token of so many rows is written by calls that are known beforehand; None where they are not."""
        decoder, few_rows = self.decoder, rows <= few.MOST[self.decoder.dtype]
        if not decoder.is_plain or not usable(self.store[0].keys):
            return None
        self.often += not few_rows
        if not few_rows and not (self.often > OFTEN and decoder.may_pack and can_tile(decoder.dtype)):
            return None
        held = self.steps.get(few_rows)
        if held is None or held.places != self.store[0].keys.data_ptr() or self.table.shape[1] > held.pages:
            sizes = [(sum(product.sizes), product.inputs) for product in decoder.products]
            most = few.MOST[decoder.dtype] if few_rows else self.size
            arena = None if few_rows else Arena(sizes)
            held = self.steps[few_rows] = Step(decoder, self.store, most, max(self.longest, self.table.shape[1]), arena)
        return held

    def _chosen(self, rows: Sequence[_Row], logits: Tensor) -> Turn:
        shaping = self.decoder.shaping
        logits = logits if shaping.is_none else shaping(logits)
        tokens = self.choose(logits, [row.number for row in rows], [row.written for row in rows]).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.last, row.written = token, row.written + 1
        return [(row.number, row.last) for row in rows]

    def _ended(self, turn: Turn) -> Turn:
        """The same, once rows that end with it have left."""
        staying = [row for row in self.rows if row.last not in self.stops and row.written < self.limit]
        if len(staying) < len(self.rows):
            kept = set(map(id, staying))
            for row in self.rows:
                if id(row) not in kept:
                    self._give(row.pages[len(self.begun.pages) :])
            self.rows, self.settled = staying, False
        return turn

    def _settle(self) -> None:
        """Makes the table that of the rows."""
        if self.settled:
            return
        self.settled = True
        most = max(len(row.pages) for row in self.rows)
        lines = [row.pages + [0] * (most - len(row.pages)) for row in self.rows]
        self.table = torch.tensor(lines, dtype=torch.int32)
        self.documents = self.decoder.rows([row.number for row in self.rows], (1,) * len(self.rows))

    def _take(self, count: int) -> list[int]:
        """Pages for a row."""
        if len(self.free) < count:
            self._reserve(count + len(self.store[0].keys) // 2)
        return [self.free.pop() for _ in range(count)]

    def _reserve(self, count: int) -> None:
        """Makes room for so many pages more."""
        held = len(self.store[0].keys)
        for pages in self.store:
            pages.grow(held + count)
        self.free += range(held + count - 1, held - 1, -1)

    def _give(self, pages: Sequence[int]) -> None:
        self.free += pages


def _spans(lengths: Sequence[int], before: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """What documents end to end see of themselves, behind `before` tokens that all see; see `kernels.attention`."""
    ends = list(accumulate(lengths, initial=0))
    return tuple((start, end, before + start, 0, before) for start, end in pairwise(ends))
