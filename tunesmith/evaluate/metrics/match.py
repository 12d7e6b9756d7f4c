"""Metrics that ask whether an answer is the right one: exact match, token F1, label accuracy, valid JSON.

All are means over rows, in per cent; of several references the best counts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from tunesmith.evaluate.metrics.metric import References, RowMean

_MISSING = object()


class ExactMatch(RowMean):
    name = "exact_match"

    @property
    def signature(self) -> str:
        return "space:normalised|case:kept|json:by-value|refs:any|scale:100"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        return [
            100.0 * any(same(text, ref) for ref in refs) for text, refs in zip(completions, references, strict=True)
        ]


class TokenF1(RowMean):
    """F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, no punctuation, no English articles."""

    name = "f1"

    @property
    def signature(self) -> str:
        return "tok:squad|case:lower|punct:no|articles:dropped|refs:max|scale:100"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        return [
            100.0 * max(token_f1(text, ref) for ref in refs) for text, refs in zip(completions, references, strict=True)
        ]


class Accuracy(RowMean):
    name = "accuracy"

    @property
    def signature(self) -> str:
        return "label:equal after strip and casefold|refs:any|scale:100"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        return [
            100.0 * (_label(text) in {_label(ref) for ref in refs})
            for text, refs in zip(completions, references, strict=True)
        ]


class ValidJson(RowMean):
    name = "valid_json"

    @property
    def signature(self) -> str:
        return "json:rfc8259 (no NaN)|whole completion|scale:100"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        return [100.0 * (parse_json(text) is not _MISSING) for text in completions]


def same(text: str, reference: str) -> bool:
    """Equal as JSON values when both are JSON (key order and spacing are free), else as words between spaces."""
    if text.split() == reference.split():
        return True
    left = parse_json(text)
    try:
        return left is not _MISSING and canonical(left) == canonical(parse_json(reference))
    except RecursionError:  # nested as deep as the parser allows; such an answer is nobody's reference
        return False


def canonical(value: object) -> object:
    """JSON values made comparable: 1 equals 1.0, but true does not equal 1."""
    if isinstance(value, dict):
        return ("object", {key: canonical(part) for key, part in value.items()})
    if isinstance(value, list):
        return ("array", [canonical(part) for part in value])
    return (isinstance(value, bool), value)


def parse_json(text: str) -> object:
    """The JSON value of the whole text, or a marker that equals nothing when it is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _MISSING


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, 0-1; two empty texts agree."""
    ours, theirs = _words(text), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    plain = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _label(text: str) -> str:
    return text.strip().casefold()


def _refuse(constant: str) -> object:
    raise ValueError(constant)
