"""Writes rows of GLUE (tsv) as labelled rows: python scripts/glue.py TASK IN.tsv OUT.jsonl

TASK says where the columns are: cola (no header), sst2, rte, mrpc, qqp, stsb, mnli, qnli, wnli. The files are those of
gluebenchmark.com (Wang et al. 2018, arXiv 1804.07461); test files have no labels and are refused.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# columns of the text, the second text and the label: places for a file without a header, names for one with it
COLUMNS: dict[str, tuple[int | str, int | str | None, int | str]] = {
    "cola": (3, None, 1),
    "sst2": ("sentence", None, "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "wnli": ("sentence1", "sentence2", "label"),
    "mrpc": ("#1 String", "#2 String", "Quality"),
    "qqp": ("question1", "question2", "is_duplicate"),
    "qnli": ("question", "sentence", "label"),
    "mnli": ("sentence1", "sentence2", "gold_label"),
    "stsb": ("sentence1", "sentence2", "score"),
}


def main() -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=COLUMNS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    found = list(rows(options.task, options.source))
    options.target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    print(f"{options.target}: {len(found)} rows")


def rows(task: str, source: Path) -> Iterator[dict[str, Any]]:
    """Labelled rows of a file."""
    text, pair, label = COLUMNS[task]
    with source.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(lines) if isinstance(text, str) else []
        places = {name: place for place, name in enumerate(header)}
        if isinstance(label, str) and label not in places:
            raise SystemExit(f"{source}: no column {label!r}; a test file has no labels")

        def cell(line: list[str], column: int | str) -> str:
            return line[places[column] if isinstance(column, str) else column].strip()

        for line in lines:
            if line and not header and len(line) <= 3:
                raise SystemExit(f"{source}: a line has {len(line)} columns; a test file has no labels")
            if line:
                second = {} if pair is None else {"text_pair": cell(line, pair)}
                yield {"text": cell(line, text), **second, "label": _label(cell(line, label), task)}


def _label(value: str, task: str) -> str | int | float:
    if task == "stsb":
        return float(value)
    return int(value) if value.isdecimal() else value


if __name__ == "__main__":
    main()
