"""Attention over pages: the kernel is its plain twin, and that is attention over a row's tokens in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.paged import PAGE, Pages, attention, keep, plain_attention, plain_keep

SHAPES = [(4, 2, 8), (9, 3, 64), (5, 1, 40), (8, 8, 128)]  # heads, kv heads, width
COUNTS = (1, 17, 70, 33, 64)


def filled(
    kv: int, width: int, dtype: torch.dtype, put: bool = True
) -> tuple[Pages, Tensor, list[tuple[Tensor, Tensor]]]:
    """Pages with some rows in them, whose pages lie in no order; the table, and keys and values of each row."""
    draw = torch.Generator().manual_seed(1)
    needed = [-(-count // PAGE) for count in COUNTS]
    pages = Pages.empty(sum(needed) + 2, kv, width, dtype)
    pages.keys.fill_(torch.nan)  # what is not written is never read
    pages.values.fill_(torch.nan)
    numbers = torch.randperm(sum(needed) + 2, generator=draw).tolist()
    table, rows = torch.full((len(COUNTS), max(needed)), 10**6, dtype=torch.int32), []
    for row, count in enumerate(COUNTS):
        mine = [numbers.pop() for _ in range(needed[row])]
        table[row, : len(mine)] = torch.tensor(mine)
        k, v = (torch.randn(count, kv, width, generator=draw).to(dtype) for _ in range(2))
        places = torch.tensor([mine[token // PAGE] * PAGE + token % PAGE for token in range(count)])
        (keep if put else plain_keep)(pages, k, v, places)
        rows.append((k, v))
    return pages, table, rows


@pytest.mark.parametrize(("heads", "kv", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (5, 0.0), (40, 0.0), (0, 0.7), (40, 0.7)])
def test_a_query_sees_the_tokens_of_its_row(
    heads: int, kv: int, width: int, dtype: torch.dtype, window: int, cap: float
) -> None:
    """Kills: a window that is one off; a page of another row; what lies behind a row's last token; a cap before the
    scale."""
    pages, table, rows = filled(kv, width, dtype)
    seen = torch.tensor(COUNTS, dtype=torch.int32)
    q = torch.randn(len(COUNTS), heads, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, plain = (run(q, pages, table, seen, 0.3, window, cap).double() for run in (attention, plain_attention))
    for row, (k, v) in enumerate(rows):
        last = window or len(k)
        k, v = (x[-last:].double().repeat_interleave(heads // kv, 1) for x in (k, v))
        scores = torch.einsum("hw,thw->ht", q[row].double(), k) * 0.3
        scores = cap * torch.tanh(scores / cap) if cap else scores
        exact = torch.einsum("ht,thw->hw", torch.softmax(scores, -1), v)
        bound = 1e-6 * float(exact.norm()) if dtype == torch.float32 else 1.1 * float((plain[row] - exact).norm())
        assert float((found[row] - exact).norm()) <= bound + 1e-7
        torch.testing.assert_close(plain[row], exact, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_kept_as_in_the_plain_twin(dtype: torch.dtype) -> None:
    """Kills: keys in the order of another page; values at the keys' place."""
    fused, plain = filled(3, 24, dtype)[0], filled(3, 24, dtype, put=False)[0]
    assert torch.equal(fused.keys.nan_to_num(9), plain.keys.nan_to_num(9))
    assert torch.equal(fused.values.nan_to_num(9), plain.values.nan_to_num(9))


def test_a_row_is_what_it_is_alone_for_any_number_of_threads() -> None:
    """Kills: sums that depend on who shares them out."""
    pages, table, _ = filled(3, 64, torch.float32)
    seen, q = torch.tensor(COUNTS, dtype=torch.int32), torch.randn(len(COUNTS), 9, 64)
    together = attention(q, pages, table, seen, 0.1)
    alone = [attention(q[[row]], pages, table[[row]], seen[[row]], 0.1) for row in range(len(COUNTS))]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(together, attention(q, pages, table, seen, 0.1))
    finally:
        torch.set_num_threads(threads)


def test_pages_that_grow_hold_what_they_held() -> None:
    pages, _, _ = filled(2, 8, torch.float32)
    before = pages.keys.clone(), pages.values.clone()
    pages.grow(len(before[0]) + 3)
    assert len(pages.keys) == len(pages.values) == len(before[0]) + 3
    for held, old in zip((pages.keys, pages.values), before, strict=True):
        assert torch.equal(held[: len(old)].nan_to_num(9), old.nan_to_num(9))
