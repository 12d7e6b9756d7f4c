"""ROUGE-L and CIDEr as the COCO caption scorers, and with them the E2E challenge, compute them.

Both work on Penn Treebank tokens in lower case without punctuation (`ptb`) and are means over rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tunesmith.evaluate.metrics import ptb
from tunesmith.evaluate.metrics.metric import References, RowMean

_Vector = dict[tuple[str, ...], float]


class RougeLCoco(RowMean):
    """F-measure with beta 1.2 of the best precision and the best recall, which may be of two references."""

    name = "rougeL_coco"
    beta = 1.2

    @property
    def signature(self) -> str:
        return f"tok:{ptb.SIGNATURE}|beta:1.2|refs:max precision, max recall|scale:100|coco-caption"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        return [
            100.0 * self._row(ptb.tokenize(text), [ptb.tokenize(ref) for ref in refs])
            for text, refs in zip(completions, references, strict=True)
        ]

    def _row(self, ours: list[str], theirs: list[list[str]]) -> float:
        if not ours:
            return float(any(not ref for ref in theirs))
        shared = [common_subsequence(ours, ref) for ref in theirs]
        precision = max(shared) / len(ours)
        recall = max(count / max(1, len(ref)) for count, ref in zip(shared, theirs, strict=True))
        if not precision or not recall:
            return 0.0
        return (1 + self.beta**2) * precision * recall / (recall + self.beta**2 * precision)


class Cider(RowMean):
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726): cosine of tf-idf vectors of 1- to 4-grams, clipped, with a
    Gaussian penalty on the difference in length, times 10. The reference measures length in word pairs, and so is
    it here. Document frequencies are those of the references of this data set, so rows are only comparable within
    it, and a data set of one row scores 0."""

    name = "cider"
    orders = 4
    sigma = 6.0

    @property
    def signature(self) -> str:
        return f"CIDEr-D|tok:{ptb.SIGNATURE}|n:4|sigma:6|idf:references of this set|scale:10|coco-caption"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        theirs = [[_grams(ptb.tokenize(ref), self.orders) for ref in refs] for refs in references]
        frequency: Counter[tuple[str, ...]] = Counter()
        for refs in theirs:
            frequency.update(set().union(*refs))
        idf = {gram: math.log(len(theirs)) - math.log(rows) for gram, rows in frequency.items()}
        scorer = _TfIdf(idf, math.log(len(theirs)), self.orders)
        return [
            self._row(scorer.vectors(_grams(ptb.tokenize(text), self.orders)), [scorer.vectors(ref) for ref in refs])
            for text, refs in zip(completions, theirs, strict=True)
        ]

    def _row(self, ours: _Vectors, theirs: list[_Vectors]) -> float:
        total = 0.0
        for ref in theirs:
            penalty = math.exp(-((ours.pairs - ref.pairs) ** 2) / (2 * self.sigma**2))
            total += penalty * sum(ours.similarity(ref, order) for order in range(self.orders))
        return 10.0 * total / self.orders / len(theirs)


def common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel rows (Hyyro 2004): one integer is a whole row."""
    places: dict[str, int] = {}
    for place, token in enumerate(ours):
        places[token] = places.get(token, 0) | (1 << place)
    mask = (1 << len(ours)) - 1
    row = mask
    for token in theirs:
        hit = row & places.get(token, 0)
        row = ((row + hit) | (row - hit)) & mask
    return len(ours) - row.bit_count()


class _Vectors:
    """Tf-idf vectors of one text, one for each order of n-gram, with their norms."""

    def __init__(self, parts: list[_Vector], pairs: int) -> None:
        self.parts = parts
        self.norms = [math.sqrt(sum(weight * weight for weight in part.values())) for part in parts]
        self.pairs = pairs

    def similarity(self, ref: _Vectors, order: int) -> float:
        theirs = ref.parts[order]
        product = sum(
            min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in self.parts[order].items()
        )
        scale = self.norms[order] * ref.norms[order]
        return product / scale if scale else product


class _TfIdf:
    def __init__(self, idf: _Vector, unseen: float, orders: int) -> None:
        self.idf = idf
        self.unseen = unseen  # of an n-gram that no reference has: as if one row had it
        self.orders = orders

    def vectors(self, grams: Counter[tuple[str, ...]]) -> _Vectors:
        parts: list[_Vector] = [{} for _ in range(self.orders)]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * self.idf.get(gram, self.unseen)
        return _Vectors(parts, sum(count for gram, count in grams.items() if len(gram) == 2))


def _grams(tokens: Sequence[str], orders: int) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, orders + 1)
        for start in range(len(tokens) - order + 1)
    )
