"""BLEU and NIST as mteval-v13a and the E2E challenge compute them: lower case, any number of references a row.

NIST (Doddington 2002) weighs n-grams by how much they tell, measured on all references of the data set.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.evaluate.metrics.metric import Metric, References

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics.metric import Floats

_Grams = list[Counter[tuple[str, ...]]]


class BleuMteval(Metric):
    """BLEU-4, no smoothing. Row statistics: matches by order, n-grams by order, length of the closest reference."""

    name = "bleu_mteval"
    orders = 4

    @property
    def signature(self) -> str:
        return "case:lc|tok:13a|smooth:none|refs:closest|scale:100|mteval-v13a"

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        import numpy as np

        rows = []
        for text, refs in zip(completions, references, strict=True):
            ours, theirs = tokenize(text), [tokenize(ref) for ref in refs]
            closest = min((abs(len(ref) - len(ours)), len(ref)) for ref in theirs)[1]
            matches = [sum(hits.values()) for hits in _hits(ours, theirs, self.orders)]
            rows.append([*matches, *_lengths(ours, self.orders), closest])
        return np.asarray(rows, dtype=np.float64)

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        matches, totals, closest = sums[..., :4], sums[..., 4:8], sums[..., 8]
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.exp(np.log(matches / totals).mean(-1))
            brevity = np.exp(np.minimum(0.0, 1.0 - closest / totals[..., 0]))
        return np.where((matches > 0).all(-1), 100.0 * precision * brevity, 0.0)


class Nist(Metric):
    """NIST-5. Row statistics: information of matches by order, n-grams by order, mean reference length."""

    name = "nist"
    orders = 5
    # a translation of two thirds of the length is worth half
    beta = -math.log(0.5) / math.log(1.5) ** 2

    @property
    def signature(self) -> str:
        return "case:lc|tok:13a|orders:5|refs:mean length|info:all references|mteval-v13a"

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        import numpy as np

        theirs = [[tokenize(ref) for ref in refs] for refs in references]
        information = _Information(theirs, self.orders)
        rows = []
        for text, refs in zip(completions, theirs, strict=True):
            ours = tokenize(text)
            told = [
                sum(information(gram) * count for gram, count in hits.items())
                for hits in _hits(ours, refs, self.orders)
            ]
            rows.append([*told, *_lengths(ours, self.orders), sum(map(len, refs)) / len(refs)])
        return np.asarray(rows, dtype=np.float64)

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        told, totals, reference = sums[..., :5], sums[..., 5:10], sums[..., 10]
        ratio = np.minimum(1.0, totals[..., 0] / np.maximum(reference, 1e-12))
        with np.errstate(divide="ignore"):
            penalty = np.exp(-self.beta * np.log(ratio) ** 2)
        return penalty * (told / np.maximum(totals, 1.0)).sum(-1)


def tokenize(text: str) -> list[str]:
    """Tokens of mteval-v13a's basic tokeniser, in lower case."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, sign)
    text = re.sub(r"([!-&(-+:-@\[-`{-~/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.lower().split()


def _grams(tokens: Sequence[str], orders: int) -> _Grams:
    return [Counter(zip(*(tokens[start:] for start in range(order)), strict=False)) for order in range(1, orders + 1)]


def _lengths(tokens: Sequence[str], orders: int) -> list[int]:
    return [max(0, len(tokens) - order) for order in range(orders)]


def _hits(ours: Sequence[str], theirs: Sequence[Sequence[str]], orders: int) -> _Grams:
    """The n-grams of a completion that a reference has, each as often as the reference with most of it."""
    best: _Grams = [Counter() for _ in range(orders)]
    for ref in theirs:
        best = [most | grams for most, grams in zip(best, _grams(ref, orders), strict=True)]
    return [grams & most for grams, most in zip(_grams(ours, orders), best, strict=True)]


class _Information:
    """log2 of how often the words before the last occur, over how often with it, in all references."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], orders: int) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        for refs in references:
            for ref in refs:
                self.counts[()] += len(ref)
                for grams in _grams(ref, orders):
                    self.counts.update(grams)

    def __call__(self, gram: tuple[str, ...]) -> float:
        return math.log2(self.counts[gram[:-1]] / self.counts[gram])
