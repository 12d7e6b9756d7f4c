"""BLEU and chrF exactly as sacrebleu computes them, with its signature.

sacrebleu counts; the counts of rows are kept apart so that they can be summed again over resampled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.evaluate.metrics.metric import Metric, References

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats


class Bleu(Metric):
    """Corpus BLEU (Papineni et al. 2002; Post 2018, arXiv:1804.08771). Row statistics: matches and n-grams of
    orders 1-4, hypothesis tokens, closest reference tokens."""

    name = "bleu"

    @property
    def signature(self) -> str:
        return _signature(self._library, "nrefs:var|")

    @cached_property
    def _library(self) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU()

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        return _count(self._library, completions, references)

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        # hypothesis and reference lengths stand first in sacrebleu's rows
        def one(row: Floats) -> float:
            counts = [int(count) for count in row]
            return self._library._compute_score_from_stats(counts).score

        return np.apply_along_axis(one, -1, sums)


class ChrF(Metric):
    """chrF2, characters only (Popovic 2015, W15-3049). Row statistics: n-grams of the hypothesis, of its best
    reference, and shared, for orders 1-6."""

    name = "chrf"

    @property
    def signature(self) -> str:
        return _signature(self._library, "nrefs:var|")

    @cached_property
    def _library(self) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        return _count(self._library, completions, references)

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        return np.apply_along_axis(lambda row: self._library._compute_score_from_stats(list(row)).score, -1, sums)


def _count(library: Any, completions: Sequence[str], references: References) -> Floats:
    # one row at a time: rows may have different numbers of references, which a corpus call cannot express
    import numpy as np

    rows = [
        library._extract_corpus_statistics([text], [[ref] for ref in refs])[0]
        for text, refs in zip(completions, references, strict=True)
    ]
    return np.asarray(rows, dtype=np.float64)


def _signature(library: Any, start: str) -> str:
    signature = library.get_signature()
    signature.info.pop("nrefs", None)
    return start + signature.format(short=False)
