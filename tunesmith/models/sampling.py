"""The next token from logits: the likeliest, or drawn with a number that belongs to the row and the turn alone.

Which other rows are in the batch, and how large it is, cannot change what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import ConfigError
from tunesmith.core.rng import torch_generator

# logits that are looked at together
_AT_ONCE = 1 << 17


class Chooser:
    """Chooses tokens of numbered rows.

    Args:
        temperature: divides logits; 0 takes the likeliest token.
        top_p: draws from the smallest set of likeliest tokens that holds this much probability (Holtzman et al.
            2020, arXiv:1904.09751).
        seed, turns: of the draws, and how many a row may need.
        numbers: what the draws of each row depend on; its place without any.

    Raises:
        ConfigError: a temperature below 0, or a top_p outside (0, 1].
    """

    def __init__(
        self, temperature: float, top_p: float, seed: int, turns: int, numbers: Sequence[int] | None = None
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature is {temperature}; it is a number from 0", where="temperature")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p is {top_p}; it is above 0 and at most 1", where="top_p")
        self.temperature, self.top_p, self.seed, self.turns = temperature, top_p, seed, turns
        self.numbers = numbers
        self._drawn: dict[int, Tensor] = {}

    def __call__(self, logits: Tensor, rows: Sequence[int], turns: Sequence[int]) -> Tensor:
        """int64 [rows] from logits [rows, vocabulary]; `rows` are their numbers, `turns` how many tokens each has."""
        if self.temperature == 0:
            return logits.max(-1).indices  # the first of equals, as argmax, in an eighth of its time
        drawn = torch.stack([self._draws(row)[turn] for row, turn in zip(rows, turns, strict=True)])
        some = max(1, _AT_ONCE // logits.shape[1])  # in parts: no copy of all logits
        parts = zip(logits.split(some), drawn.to(logits.device).split(some), strict=True)
        return torch.cat([self._drawn_from(*part) for part in parts])

    def _drawn_from(self, logits: Tensor, drawn: Tensor) -> Tensor:
        chance = torch.softmax(logits.double().div_(self.temperature), -1)
        order = None
        if self.top_p < 1:
            chance, order = torch.sort(chance, dim=-1, descending=True, stable=True)
            before = chance.cumsum(-1) - chance
            chance = chance.masked_fill(before >= self.top_p, 0.0)
        reach = chance.cumsum(-1)
        place = torch.searchsorted(reach, (drawn * reach[:, -1])[:, None], right=True)
        last = (chance > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # rounding may point behind the last one
        place = torch.minimum(place, last)
        return (place if order is None else order.gather(-1, place))[:, 0]

    def _draws(self, row: int) -> Tensor:
        if row not in self._drawn:
            number = row if self.numbers is None else self.numbers[row]
            generator = torch_generator(self.seed, "sampling", number)
            self._drawn[row] = torch.rand(self.turns, generator=generator, dtype=torch.float64)
        return self._drawn[row]
