"""ROUGE-1, -2, -L and -Lsum exactly as the rouge-score package computes them (Lin 2004, W04-1013).

Of several references the one with the best F-measure counts, row by row; the value is the mean in per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tunesmith.evaluate.metrics.metric import References, RowMean


class Rouge1(RowMean):
    name = "rouge1"

    @property
    def signature(self) -> str:
        # the package's tokeniser keeps ASCII letters and digits only, so other scripts score 0
        return f"{self.name}:fmeasure|tok:ascii-alnum|case:lower|stemmer:no|refs:max|scale:100|rouge-score"

    @cached_property
    def _library(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.name], use_stemmer=False)

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        return [
            100.0 * self._library.score_multi(list(refs), text)[self.name].fmeasure
            for text, refs in zip(completions, references, strict=True)
        ]


class Rouge2(Rouge1):
    name = "rouge2"


class RougeL(Rouge1):
    name = "rougeL"


class RougeLsum(Rouge1):
    """Sentences are the lines of the text, as in the package."""

    name = "rougeLsum"

    @property
    def signature(self) -> str:
        return super().signature + "|sentences:lines"
