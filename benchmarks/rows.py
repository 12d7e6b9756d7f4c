"""The steps that both sides of a benchmark train on: real text, at lengths like those of real data.

The one idea: rows of a real data set are joined and cut to lengths drawn from a lognormal distribution, and the last
30 to 70 % of each is supervised, half of all tokens; so that length is the only thing that differs between `short`,
`mixed` and `long`. `real` leaves rows and what is supervised as they are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # ids, supervised


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of tokens a row, cut off at both ends, and how many rows make an update."""

    median: float
    sigma: float
    least: int
    most: int
    rows: int

    def draw(self, source: random.Random) -> int:
        """One length."""
        return min(max(round(source.lognormvariate(math.log(self.median), self.sigma)), self.least), self.most)


LENGTHS = {
    "short": Lengths(60, 0.5, 16, 160, 16),
    "mixed": Lengths(115, 0.62, 30, 400, 8),
    "long": Lengths(600, 0.45, 256, 1536, 4),
}


def make_steps(settings: dict[str, Any], folder: Path) -> list[list[Row]]:
    """The rows of every update.

    Args:
        settings: `data`, `max_length`, `lengths`, `rows` of an update, `steps`, `prefix`, and `seed`.
        folder: of the model, for its tokenizer.
    """
    real = examples(settings, folder)
    if settings["lengths"] == "real":
        found: Iterator[Row] = real
    else:
        found = shaped(real, LENGTHS[settings["lengths"]], settings.get("seed", 0))
    if settings["prefix"]:
        found = prefixed(real, found, settings["prefix"])
    return [list(islice(found, settings["rows"])) for _ in range(settings["steps"])]


def examples(settings: dict[str, Any], folder: Path) -> Iterator[Row]:
    """Rows of the data in the order of a run, for ever."""
    from tunesmith.data.codec import Codec
    from tunesmith.data.dataset import open_data
    from tunesmith.data.order import Mixture
    from tunesmith.data.pack import Sizes, StepStream
    from tunesmith.data.section import DataSection

    section = DataSection(train=settings["data"], max_length=settings["max_length"])
    data = open_data(section.train, section, Codec.open(folder))
    mixture = Mixture(data.sizes, data.weights, settings.get("seed", 0))
    for step in StepStream(mixture, data.example, Sizes(rows_per_step=1)):
        for row in step.micro_batches[0]:
            yield {"ids": list(row.ids), "supervised": list(row.supervised)}


def shaped(real: Iterator[Row], lengths: Lengths, seed: int) -> Iterator[Row]:
    """Rows of drawn lengths; each begins where a real one does."""
    source = random.Random(seed)
    while True:
        wanted, ids = lengths.draw(source), list[int]()
        while len(ids) < wanted:
            ids += next(real)["ids"]
        learnt = max(1, round(source.uniform(0.3, 0.7) * wanted))
        yield {"ids": ids[:wanted], "supervised": [False] * (wanted - learnt) + [True] * learnt}


def prefixed(real: Iterator[Row], rows: Iterator[Row], tokens: int) -> Iterator[Row]:
    """Rows that all begin with the same so many tokens of real text, which are not supervised."""
    beginning: list[int] = []
    while len(beginning) < tokens:
        beginning += next(real)["ids"]
    for row in rows:
        yield {"ids": beginning[:tokens] + row["ids"], "supervised": [False] * tokens + row["supervised"]}
