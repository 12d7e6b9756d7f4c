"""One token more of every row as a list of C calls whose places are fixed, made once and run for each token.

With so little work a token, looking for what to do takes longer than much of doing it. Only a decoder in which nothing
but low-rank changes acts on the maps has such a list; `decode.py` says the same in full, and is what is meant.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.kernels import elementwise, few, paged
from tunesmith.kernels.build import DTYPES, imitating, threads
from tunesmith.kernels.packed import Arena, joined, scratch
from tunesmith.kernels.packed import kernels as packing

if TYPE_CHECKING:
    from tunesmith.models.decode import Decoder, Norm, Product, Rows

Call = tuple[Callable[..., int], tuple[Any, ...]]


class Step:
    """Calls for up to so many rows of a decoder.

    Args:
        decoder: with `is_plain`.
        store: pages of each layer, which stay where they are.
        most: rows.
        pages: of a row at most.
        arena: where weights are laid out for products of some rows; None for products of few.
    """

    def __init__(
        self, decoder: Decoder, store: Sequence[paged.Pages], most: int, pages: int, arena: Arena | None
    ) -> None:
        self.decoder, self.arena, self.pages = decoder, arena, pages
        self.places = store[0].keys.data_ptr()
        self.dtype, self.threads, self.rows = DTYPES[decoder.dtype], threads(), ctypes.c_long(0)
        self.calls: list[Call] = []
        self.kept: list[Tensor] = []  # what the calls point to
        config, width, heads, kv = decoder.config, decoder.width, decoder.heads, decoder.kv
        self.x, self.beside, self.h = (self._room(most, config.hidden_size) for _ in range(3))
        self.inverse = self._room(most, heads + kv, dtype=torch.float32)
        self.qkv, self.both = self._room(most, (heads + 2 * kv) * width), self._room(most, 2 * config.intermediate_size)
        self.q, self.mixed = self._room(most, heads * width), self._room(most, heads * width)
        self.k, self.v = self._room(most, kv * width), self._room(most, kv * width)
        self.gated = self._room(most, config.intermediate_size)
        self.logits = self._room(most, decoder.head.sizes[0])
        self.turns = {kind: self._room(2, most, turned) for kind, turned in decoder.turned.items()}
        self.table = torch.zeros(most, pages, dtype=torch.int32)
        self.seen, self.groups = torch.zeros(2, most, dtype=torch.int32)
        self.at = torch.zeros(most, dtype=torch.int64)
        self.spare = self._room(self.threads, paged.TOGETHER * (pages * paged.PAGE + width), dtype=torch.float32)
        self.narrow = self._room(
            (most + 3) // 4 * 4 * max(product.most for product in decoder.products), dtype=torch.float32
        )
        self.blocks = scratch(most, max(product.inputs for product in decoder.products))
        for number, block in enumerate(decoder.blocks):
            self._norm(block.before, number > 0)
            self._product(block.qkv, self.h, self.qkv)
            self._norm_heads(block.heads.norms)
            self._attend(number, store[number])
            self._product(block.o, self.mixed, self.beside)
            self._norm_answer(block.after[:1])
            self._norm(block.between, True)
            self._product(block.both, self.h, self.both)
            self._call(
                elementwise.kernels.ts_gated, self.both, self.gated, self.rows, config.intermediate_size,
                elementwise.KINDS.index(decoder.gate), self.dtype, self.threads,
            )  # fmt: skip
            self._product(block.down, self.gated, self.beside)
            self._norm_answer(block.after[1:])
        self._norm(decoder.norm, True)
        self._product(decoder.head, self.h, self.logits)

    def __call__(self, ids: Tensor, positions: Tensor, at: Tensor, seen: Tensor, table: Tensor, rows: Rows) -> Tensor:
        """Logits [rows, vocabulary], valid until the next call; see `Decoder.states` and `kernels.paged`."""
        count = self.rows.value = len(ids)
        with rows.enter(rows.lengths):
            x = self.decoder.base.embed_tokens(ids[None])
            for kind, parts in self.decoder.form.tables(self.decoder.base, x, positions[None]).items():
                self.turns[kind][0, :count], self.turns[kind][1, :count] = parts
        self.x[:count] = x[0]
        self.at[:count], self.seen[:count] = at, seen
        self.table[:count, : table.shape[1]] = table
        if rows.groups is not None:
            self.groups[:count] = rows.groups
        if not imitating():
            for function, given in self.calls:
                function(*given)
        return self.logits[:count]

    def _room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.decoder.dtype)

    def _call(self, function: Callable[..., int], *given: Any) -> None:
        held = [one for one in given if isinstance(one, Tensor)]
        self.kept += held
        self.calls.append((function, tuple(one.data_ptr() if isinstance(one, Tensor) else one for one in given)))

    def _norm(self, norm: Norm, adds: bool) -> None:
        weight = norm.weight
        assert weight is not None
        self._call(
            elementwise.kernels.ts_rms_norm, self.x, self.beside if adds else None, weight, self.x if adds else None,
            self.h, self.inverse, self.rows, self.x.shape[1], norm.eps, norm.offset, self.dtype, DTYPES[weight.dtype],
            self.threads,
        )  # fmt: skip

    def _norm_answer(self, norms: Sequence[Norm]) -> None:
        """Norms what is to be added, where it lies."""
        for norm in norms:
            weight = norm.weight
            assert weight is not None
            self._call(
                elementwise.kernels.ts_rms_norm, self.beside, None, weight, None, self.beside, self.inverse, self.rows,
                self.x.shape[1], norm.eps, norm.offset, self.dtype, DTYPES[weight.dtype], self.threads,
            )  # fmt: skip

    def _norm_heads(self, norms: Sequence[Norm]) -> None:
        """Norms heads of queries and keys, where they lie."""
        if not norms:
            return
        (of_q, of_k), decoder = norms, self.decoder
        assert of_q.weight is not None
        assert of_k.weight is not None
        self._call(
            elementwise.kernels.ts_norm_heads, self.qkv, of_q.weight, of_k.weight, self.qkv, self.inverse, self.rows,
            decoder.heads, decoder.kv, decoder.width, of_q.eps, of_q.offset, self.dtype, DTYPES[of_q.weight.dtype],
            self.threads,
        )  # fmt: skip

    def _product(self, product: Product, x: Tensor, y: Tensor) -> None:
        k, whole, start = product.inputs, y.shape[1], 0
        if self.arena is not None:
            bias = joined(product.biases) if product.biases else None
            laid = self.arena.put(joined(product.weights))
            self._call(packing.ts_packed, x, laid, bias, y, self.blocks, self.rows, sum(product.sizes), k, self.threads)
        for number, (weight, size) in enumerate(zip(product.weights, product.sizes, strict=True)):
            part, factors = y[:, start : start + size], product.factors[number]
            if self.arena is None:
                bias = product.biases[number] if product.biases else None
                self._call(
                    few.kernels.ts_few, x, weight, None, None, bias, part, self.rows, k, 0, size, whole, self.dtype,
                    self.threads,
                )  # fmt: skip
            if factors.most:
                self._call(
                    few.kernels.ts_few_changes, x, part, *factors.addresses, factors.ranks, self.groups, self.narrow,
                    self.rows, k, size, whole, factors.most, self.dtype, self.threads,
                )  # fmt: skip
            start += size

    def _attend(self, number: int, pages: paged.Pages) -> None:
        decoder = self.decoder
        heads, kv, width, kind = decoder.heads, decoder.kv, decoder.width, decoder.kinds[number]
        self._call(
            elementwise.kernels.ts_split_rope, self.qkv, *self.turns[kind], self.q, self.k, self.v, self.rows, heads,
            kv, width, decoder.turned[kind], 0, self.dtype, self.dtype, self.threads,
        )  # fmt: skip
        self._call(
            paged.kernels.ts_paged_keep, self.k, self.v, pages.keys, pages.values, self.at, self.rows, kv, width,
            paged.PAGE, self.dtype, self.threads,
        )  # fmt: skip
        self._call(
            paged.kernels.ts_paged_attention, self.q, pages.keys, pages.values, self.table, self.seen, self.mixed,
            self.spare, self.rows, kv, heads // kv, width, paged.PAGE, self.pages, decoder.windows[number],
            self.pages * paged.PAGE, decoder.scale, decoder.caps[number], self.dtype, self.threads,
        )  # fmt: skip
