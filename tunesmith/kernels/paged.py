"""Attention of tokens that are being written, over keys and values in pages, and the plain twin.

A page holds `PAGE` tokens of one row, for all of the model's layers alike; which pages a row has is a line of a table.
So rows of any length share one store, and what rows begin with may be the same pages. Nothing here has a backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.build import DTYPES, Functions, pointer, threads, usable

PAGE = 32
_SIDE = 16  # tokens whose keys lie side by side
TOGETHER = 4  # heads whose scores a thread holds


@dataclass
class Pages:
    """The keys and values of one layer.

    Attributes:
        keys: [pages, kv heads, PAGE / 16, width, 16].
        values: [pages, kv heads, PAGE, width].
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, count: int, kv: int, width: int, dtype: torch.dtype) -> Pages:
        """Pages that nothing is in."""
        keys = torch.empty(count, kv, PAGE // _SIDE, width, _SIDE, dtype=dtype)
        return cls(keys, torch.empty(count, kv, PAGE, width, dtype=dtype))

    def grow(self, count: int) -> None:
        """Makes them `count`; what is in the first ones stays."""
        self.keys, self.values = (_longer(held, count) for held in (self.keys, self.values))


def _longer(held: Tensor, count: int) -> Tensor:
    found = held.new_empty(count, *held.shape[1:])
    found[: len(held)] = held
    return found


def keep(pages: Pages, k: Tensor, v: Tensor, places: Tensor) -> None:
    """Puts keys and values [tokens, kv heads, width] into pages.

    Args:
        places: int64 [tokens]: number of the page x PAGE + number of the token in it.
    """
    if not usable(pages.keys, k, v):
        return plain_keep(pages, k, v, places)
    k, v = k.contiguous(), v.contiguous()
    tokens, kv, width = k.shape
    kernels.ts_paged_keep(
        pointer(k), pointer(v), pointer(pages.keys), pointer(pages.values), pointer(places),
        tokens, kv, width, PAGE, DTYPES[k.dtype], threads(),
    )  # fmt: skip


def plain_keep(pages: Pages, k: Tensor, v: Tensor, places: Tensor) -> None:
    """The plain twin of `keep`."""
    page, token = places // PAGE, places % PAGE
    pages.keys[page, :, token // _SIDE, :, token % _SIDE] = k
    pages.values[page, :, token] = v


def attention(
    q: Tensor, pages: Pages, table: Tensor, seen: Tensor, scale: float, window: int = 0, cap: float = 0.0
) -> Tensor:
    """What one query a row makes of the row's tokens, its own the last: [rows, heads, width].

    Args:
        q: [rows, heads, width], in the dtype of the pages.
        table: int32 [rows, pages of the longest]: numbers of each row's pages, in order.
        seen: int32 [rows]: tokens of each.
        scale: of the scores.
        window: a query sees so many tokens at most, its own with them; 0 for all.
        cap: scaled scores s become cap x tanh(s / cap); 0 leaves them.
    """
    if not usable(pages.keys, q):
        return plain_attention(q, pages, table, seen, scale, window, cap)
    q = q.contiguous()
    found, kv, longest = torch.empty_like(q), pages.values.shape[1], table.shape[1] * PAGE
    spare = torch.empty(threads() * TOGETHER * (longest + q.shape[2]))
    kernels.ts_paged_attention(
        pointer(q), pointer(pages.keys), pointer(pages.values), pointer(table), pointer(seen), pointer(found),
        pointer(spare), q.shape[0], kv, q.shape[1] // kv, q.shape[2], PAGE, table.shape[1], window, longest, scale,
        cap, DTYPES[q.dtype], threads(),
    )  # fmt: skip
    return found


def plain_attention(
    q: Tensor, pages: Pages, table: Tensor, seen: Tensor, scale: float, window: int = 0, cap: float = 0.0
) -> Tensor:
    """The plain twin of `attention`."""
    found = torch.empty_like(q)
    for row, count in enumerate(seen.tolist()):
        first = max(0, count - window) if window else 0
        held = table[row, : -(-count // PAGE)].long()
        k = pages.keys[held].permute(1, 0, 2, 4, 3).flatten(1, 3)[:, first:count]
        v = pages.values[held].transpose(0, 1).flatten(1, 2)[:, first:count]
        one = q[row].unflatten(0, (len(k), -1))
        scores = (one.float() * scale) @ k.float().transpose(1, 2)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        found[row] = (torch.softmax(scores, -1) @ v.float()).flatten(0, 1).to(q.dtype)
    return found


kernels = Functions(
    ts_paged_keep="ppppp" "llll" "ii",
    ts_paged_attention="ppppppp" "llllllll" "ff" "ii",
)  # fmt: skip
