"""What a dataset comes to in rows and tokens: kept, left out and why, cut, repeated.

The one idea: kept and left out add up to the rows looked at, and nothing is cut or lost without being counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.problem import Problem
from tunesmith.data.encode import Dropped, Example
from tunesmith.data.labels import label_names

_RARE = ("labels", "scores", "best", "others", "best_tokens", "other_tokens")  # kept only where there are any
_REMEMBERED = 2_000_000  # rows whose hashes are kept to find repeats: 100 bytes each, 200 MB in all
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)  # made once: there are millions of rows


@dataclass
class DataStatistics:
    """Counts over the rows looked at.

    Attributes:
        rows: in the dataset; `examined` of them were turned into tokens.
        kept: rows that can be learnt from; `dropped` counts the others by reason.
        truncated_rows: rows that lost `truncated_tokens` in all.
        tokens: of kept rows, `supervised_tokens` of them learnt.
        longest_tokens: of the longest kept row.
        escaped_rows: rows that hold control-token strings, which were encoded as ordinary text.
        duplicates: rows that are exactly an earlier row.
        lengths: kept rows by length: `{64: 3}` are three rows of 33 to 64 tokens.
        labels: how often each label is there, where labels are to be predicted.
        scores: smallest and largest of the scores that are to be predicted.
        best, others: answers that are compared, the best of each row and those below it; `best_tokens` and
            `other_tokens` are theirs, prompts aside.
    """

    rows: int = 0
    examined: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated_rows: int = 0
    truncated_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0
    escaped_rows: int = 0
    duplicates: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    scores: tuple[float, float] | None = None
    best: int = 0
    others: int = 0
    best_tokens: int = 0
    other_tokens: int = 0
    hashes: set[int] = field(default_factory=set, repr=False)

    def add(self, found: Example | Dropped) -> None:
        """Counts one row as tokens."""
        self.examined += 1
        if isinstance(found, Dropped):
            self.dropped[found.reason] += 1
            return
        self.kept += 1
        self.tokens += len(found.ids)
        self.supervised_tokens += sum(found.supervised)
        self.longest_tokens = max(self.longest_tokens, found.longest_tokens)
        self._compare(found)
        self.truncated_rows += found.truncated_tokens > 0
        self.truncated_tokens += found.truncated_tokens
        self.escaped_rows += found.escaped > 0
        self.lengths[1 << (len(found.ids) - 1).bit_length()] += 1

    def _compare(self, found: Example) -> None:
        for document, rank in zip(found.documents() if found.ranks else (), found.ranks, strict=True):
            if rank == 0:
                self.best, self.best_tokens = self.best + 1, self.best_tokens + document.answer_tokens
            else:
                self.others, self.other_tokens = self.others + 1, self.other_tokens + document.answer_tokens

    def see(self, value: int) -> None:
        """Notices an exact repeat of a row, by its `row_hash`."""
        if value in self.hashes:
            self.duplicates += 1
        elif len(self.hashes) < _REMEMBERED:
            self.hashes.add(value)

    def shared_with(self, other: DataStatistics) -> int:
        """How many different rows of this dataset are rows of the other, too."""
        return len(self.hashes & other.hashes)

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values, for run.json and the report."""
        values = {key: value for key, value in vars(self).items() if key != "hashes" and (value or key not in _RARE)}
        lengths = {str(bound): self.lengths[bound] for bound in sorted(self.lengths)}
        return {**values, "dropped": dict(self.dropped), "lengths": lengths}

    def judge(self, labels: tuple[float, ...], problem: Problem) -> None:
        """Counts the labels of one row."""
        if problem.kind != "regression":
            self.labels.update(label_names(labels, problem))
            return
        low, high = self.scores or (labels[0], labels[0])
        self.scores = min(low, *labels), max(high, *labels)

    def _learnt(self) -> str:
        if self.scores:
            return f"scores from {self.scores[0]:g} to {self.scores[1]:g}"
        if self.labels:
            return "labels " + ", ".join(f"{name}: {count}" for name, count in self.labels.most_common(10))
        if self.best or self.others:
            best, others = self.best_tokens / max(1, self.best), self.other_tokens / max(1, self.others)
            return f"answers of {best:.0f} tokens on average where chosen, {others:.0f} where rejected"
        return f"{self.supervised_tokens} supervised"

    def line(self) -> str:
        """The counts in one line."""
        parts = [f"{self.kept} of {self.examined} rows kept", f"{self.tokens} tokens"]
        parts.append(self._learnt())
        parts += [f"{count} left out: {reason}" for reason, count in self.dropped.most_common()]
        if self.truncated_rows:
            parts.append(f"{self.truncated_rows} cut by {self.truncated_tokens} tokens")
        if self.duplicates:
            parts.append(f"{self.duplicates} exact repeats")
        if self.escaped_rows:
            parts.append(f"{self.escaped_rows} hold control-token strings (read as text)")
        return ", ".join(parts)


def row_hash(data: dict[str, Any]) -> int:
    """64 bits that equal rows share."""
    raw = _CANONICAL.encode(data).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
