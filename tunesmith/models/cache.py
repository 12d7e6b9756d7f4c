"""Keys and values of rows that are being written, in memory that is set aside ahead of need.

transformers' dynamic cache copies everything at each token; here a token is written in place, and rows and columns
that nobody needs any more are dropped together. Sliding windows are a matter of the mask, so all layers keep all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# columns set aside at a time
SPARE = 64


class RowCache(Cache):
    """A cache for a batch of rows; transformers' models write to it."""

    def __init__(self, spare: int = SPARE) -> None:
        super().__init__(layer_class_to_replicate=cast(Any, partial(Room, spare)))

    def spread(self, rows: int, spare: int) -> RowCache:
        """A new cache in which each of `rows` rows has what the one row of this cache has."""
        wide = RowCache(spare)
        wide.layers = [layer.spread(rows, spare) for layer in self._rooms]
        return wide

    def keep(self, rows: Tensor, columns: Tensor, spare: int) -> None:
        """Drops all but some rows and columns: int64 [kept rows], int64 [kept columns]."""
        for layer in self._rooms:
            layer.keep(rows, columns, spare)

    @property
    def _rooms(self) -> list[Room]:
        return cast("list[Room]", self.layers)


class Room(DynamicLayer):
    """One layer of a `RowCache`. `keys` and `values` [rows, heads, tokens, width] are views of what is set aside."""

    def __init__(self, spare: int = SPARE) -> None:
        super().__init__()
        self.spare = spare
        self.tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = _room(key_states, len(key_states), 0)
        self._values = _room(value_states, len(value_states), 0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.tokens = self.tokens, self.tokens + key_states.shape[2]
        if self.tokens > self._keys.shape[2]:
            room = self.tokens + max(self.spare, self.tokens // 4)
            self._keys, self._values = _moved(self._keys, start, room), _moved(self._values, start, room)
        self._keys[:, :, start : self.tokens] = key_states
        self._values[:, :, start : self.tokens] = value_states
        return self._view()

    def spread(self, rows: int, spare: int) -> Room:
        wide = Room(spare)
        if not self.is_initialized:  # a layer that borrows the keys of another
            return wide
        wide.dtype, wide.device, wide.is_initialized, wide.tokens = self.dtype, self.device, True, self.tokens
        room = self.tokens + spare
        wide._keys = _moved(self._keys.expand(rows, -1, -1, -1), self.tokens, room)
        wide._values = _moved(self._values.expand(rows, -1, -1, -1), self.tokens, room)
        wide._view()
        return wide

    def keep(self, rows: Tensor, columns: Tensor, spare: int) -> None:
        if not self.is_initialized:
            return
        room = len(columns) + spare
        self._keys = _kept(self._keys, rows, columns, room)
        self._values = _kept(self._values, rows, columns, room)
        self.tokens = len(columns)
        self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self.tokens], self._values[:, :, : self.tokens]
        return self.keys, self.values


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, like.shape[1], columns, like.shape[3])


def _moved(old: Tensor, tokens: int, columns: int) -> Tensor:
    room = _room(old, len(old), columns)
    room[:, :, :tokens] = old[:, :, :tokens]
    return room


def _kept(old: Tensor, rows: Tensor, columns: Tensor, room: int) -> Tensor:
    new = _room(old, len(rows), room)
    for place, row in enumerate(rows.tolist()):  # row by row: no second copy of the whole cache
        new[place, :, : len(columns)] = torch.index_select(old[row], 1, columns)
    return new
