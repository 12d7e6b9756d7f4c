"""Writes questions of WikiSQL as prompts and SQL: python scripts/wikisql.py wikisql.json.bz2 OUT.jsonl --part dev

Reads the file of github.com/jkkummerfeld/text2sql-data (Finegan-Dollak et al. 2018, arXiv 1806.09029), which holds the
questions of Zhong et al. 2017 (arXiv 1709.00103) without their tables. The columns that a prompt lists are those that
any question about its table uses; for a table with one question these are the columns of its answer.
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = "columns: {columns}\nquestion: {question}\nSQL:"
_COLUMN = r"(?:TABLEalias0\.)?(\S+)_FIELD"
_SELECT = re.compile(rf"SELECT (?:(MAX|MIN|COUNT|SUM|AVG) )?{_COLUMN} FROM TABLE AS TABLEalias0(?: WHERE (.*))? ;")
_CONDITION = re.compile(rf"{_COLUMN} (=|<|>) (?:\"(.*)\"|(\S.*))")


def main() -> None:
    """Converts one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--part", choices=("train", "dev", "test"), default="train")
    parser.add_argument("--rows", type=int, help="the first so many")
    options = parser.parse_args()
    opened = bz2.open if options.source.suffix == ".bz2" else open
    with opened(options.source, "rt", encoding="utf-8") as stream:
        found = json.load(stream)
    made = list(rows(found, options.part))[: options.rows]
    options.target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), "utf-8")
    print(f"{options.target}: {len(made)} rows")


def rows(entries: list[dict[str, Any]], part: str) -> Iterator[dict[str, str]]:
    """Prompts and completions of a part, in the order of the file."""
    read = [(query, entry["sentences"]) for entry in entries if (query := _query(entry["sql"][0])) is not None]
    columns: dict[str, set[str]] = {}
    for (_, column, conditions), sentences in read:
        for sentence in sentences:
            columns.setdefault(sentence["table-id"], set()).update([column, *(name for name, _, _ in conditions)])
    for query, sentences in read:
        for sentence in sentences:
            if sentence["question-split"] == part:
                listed = ", ".join(sorted(columns[sentence["table-id"]]))
                prompt = PROMPT.format(columns=listed, question=sentence["original"].strip())
                yield {"prompt": prompt, "completion": " " + _written(query, sentence["variables"])}


Condition = tuple[str, str, str]


def _query(sql: str) -> tuple[str, str, list[Condition]] | None:
    """Aggregation, column and conditions; None for the few that are of another form."""
    found = _SELECT.fullmatch(sql)
    if found is None:
        return None
    parts = [_CONDITION.fullmatch(part) for part in found[3].split(" AND ")] if found[3] else []
    if None in parts:
        return None
    conditions = [(_name(part[1]), part[2], part[3] or part[4]) for part in parts if part]
    return found[1] or "", _name(found[2]), conditions


def _name(field: str) -> str:
    return field.replace("_", " ").lower()


def _written(query: tuple[str, str, list[Condition]], variables: dict[str, str]) -> str:
    aggregation, column, conditions = query
    selected = f"{aggregation}({column})" if aggregation else column
    tests = [f"{name} {operator} {_value(variables.get(value, value))}" for name, operator, value in conditions]
    return f"SELECT {selected} FROM table" + (f" WHERE {' AND '.join(tests)}" if tests else "")


def _value(value: str) -> str:
    if re.fullmatch(r"-?\d+(\.\d+)?", value):
        return value
    return "'" + value.replace("'", "''") + "'"


if __name__ == "__main__":
    main()
