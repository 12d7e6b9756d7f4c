"""Writes files of compared answers as rows of the format preference:

    python scripts/preference.py hh IN.jsonl.gz TRAIN.jsonl TEST.jsonl
    python scripts/preference.py llmbar IN.json... OUT.jsonl

HH-RLHF (Bai et al. 2022, arXiv 2204.05862) is split by the hash of its prompts, two in five of which are for testing;
LLMBar (Zeng et al. 2024, arXiv 2310.07641) is for testing alone. Rows that the format refuses are left out and counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.data.bundled import in_test
from tunesmith.data.comparisons import preference

TEST_SHARE = 0.4


def main() -> None:
    """Converts files of one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("hh", "llmbar"))
    parser.add_argument("files", nargs="+", type=Path, help="what is read, then what is written")
    options = parser.parse_args()
    made = hh(*options.files) if options.name == "hh" else llmbar(*options.files)
    for path, rows in made.items():
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        print(f"{path}: {len(rows)} rows")


def hh(source: Path, train: Path, test: Path) -> dict[Path, list[Any]]:
    """Rows of both parts; dialogues that begin alike are on one side."""
    made: dict[Path, list[Any]] = {train: [], test: []}
    refused = 0
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            try:
                prompt = preference(row).prompt
            except DataError:
                refused += 1
                continue
            made[test if in_test(prompt[0].content, TEST_SHARE) else train].append(row)
    print(f"{source}: {refused} rows refused")
    return made


def llmbar(*files: Path) -> dict[Path, list[Any]]:
    """Rows of all but the last file."""
    rows = [row for source in files[:-1] for row in json.loads(source.read_text("utf-8"))]
    return {files[-1]: [_chosen(row) for row in rows]}


def _chosen(row: dict[str, Any]) -> dict[str, str]:
    answers = row["output_1"], row["output_2"]
    return {"prompt": row["input"], "chosen": answers[row["label"] - 1], "rejected": answers[2 - row["label"]]}


if __name__ == "__main__":
    main()
