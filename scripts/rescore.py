"""Scores answers that were saved, again: the columns of a samples.jsonl with other metrics, or cut at the first line.

    python scripts/rescore.py zero/samples.jsonl --metrics e2e --first-line

An untuned model often goes on with cases of its own after its answer; --first-line asks what the answer is worth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tunesmith.evaluate.bootstrap import interval
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.section import metric_names


def main() -> None:
    """Prints a line for each column and metric: value, 95 % interval, signature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--metrics", default="e2e", help="names with commas between them, or e2e")
    parser.add_argument("--first-line", action="store_true", help="cut every answer at its first line break")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.samples.read_text("utf-8").splitlines()]
    references = [row["references"] for row in rows]
    for column in [name for name in rows[0] if name not in ("prompt", "references")]:
        answers = [str(row[column]) for row in rows]
        if options.first_line:
            answers = [answer.strip().split("\n")[0] for answer in answers]
        for name in metric_names(tuple(options.metrics.split(","))):
            metric = METRICS.load(name)()
            metric.require()
            found = interval(metric, metric.statistics(answers, references)).as_dict()
            value = f"{found['value']:.2f} ({found['low']:.2f}, {found['high']:.2f})"
            print(f"{column}  {name}  {value}  {metric.signature}")


if __name__ == "__main__":
    main()
