"""Writes E2E NLG rows (csv: mr, ref) as prompts and completions, for learning or, with --test, for testing.

    python scripts/e2e.py devset.csv e2e.train.jsonl               a row for every reference
    python scripts/e2e.py testset_w_refs.csv e2e.test.jsonl --test a row for every meaning, with all of its references

The rows of a test are in the order of a hash of their meaning, so that the first n of them are a fair sample.
The files are those of the E2E NLG challenge (Novikova et al. 2017, arXiv 1706.09254; CC BY-SA 4.0).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from pathlib import Path
from typing import Any

QUESTION = "Write one or two sentences that describe this place.\n{meaning}\n"


def main() -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--test", action="store_true", help="one row a meaning, with its references")
    parser.add_argument("--chat", action="store_true", help="rows of messages, for the model's own chat template")
    options = parser.parse_args()
    pairs = read(options.source)
    rows = grouped(pairs) if options.test else [row(meaning, reference) for meaning, reference in pairs]
    rows = [as_messages(one) for one in rows] if options.chat else rows
    with options.target.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
    print(f"{options.target}: {len(rows)} rows, {len({meaning for meaning, _ in pairs})} meanings")


def read(path: Path) -> list[tuple[str, str]]:
    """(meaning, reference) of every line, without space around them."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [(line["mr"].strip(), line["ref"].strip()) for line in csv.DictReader(stream)]


def row(meaning: str, completion: str) -> dict[str, Any]:
    """A row to learn from."""
    return {"prompt": QUESTION.format(meaning=meaning), "completion": completion}


def as_messages(one: dict[str, Any]) -> dict[str, Any]:
    """The same row as a user's and an assistant's turn."""
    turns = [{"role": "user", "content": one["prompt"].strip()}, {"role": "assistant", "content": one["completion"]}]
    return {"messages": turns, **{name: value for name, value in one.items() if name == "references"}}


def grouped(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each meaning, with every text that people wrote for it."""
    references: dict[str, list[str]] = {}
    for meaning, reference in pairs:
        references.setdefault(meaning, []).append(reference)
    order = sorted(references, key=lambda meaning: hashlib.sha256(meaning.encode()).hexdigest())
    return [row(meaning, references[meaning][0]) | {"references": references[meaning]} for meaning in order]


if __name__ == "__main__":
    main()
