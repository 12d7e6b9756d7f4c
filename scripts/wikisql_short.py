"""Short WikiSQL questions with the columns of their table: python scripts/wikisql_short.py wikisql.json.bz2 FOLDER

The file is the one of Finegan-Dollak et al. 2018 (text2sql-data) with the questions of Zhong et al. 2017. Rows are
{prompt: columns and question, completion: SQL}, those with one condition whose value stands in the question, in the
order of the hash of their prompts: 600 in sft.jsonl, 3,000 in prompts.jsonl, 200 of the test split in test.jsonl.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.evaluate.metrics.wikisql import parse_query

FIELD = re.compile(r"TABLEalias0\.([^\s,()]+?)_FIELD")
Question = tuple[str, str, str, str, list[str]]  # split, table, question, SQL, values


def questions(rows: list[dict[str, Any]], columns: dict[str, set[str]]) -> Iterator[Question]:
    """Every question with its own values in its SQL; notes on the way which columns a table is known to have."""
    for row in rows:
        query = row["sql"][0]
        names = [name.replace("_", " ").lower() for name in FIELD.findall(query)]
        for sentence in row["sentences"]:
            columns[sentence["table-id"]].update(names)
            values = {one["name"]: one["example"] for one in row["variables"]} | sentence["variables"]
            asked = list(sentence["variables"].values())
            said = sentence["original"].strip()
            yield sentence["question-split"], sentence["table-id"], said, sql(query, values), asked


def sql(query: str, values: dict[str, str]) -> str:
    """A query with the names of columns and values as text."""
    text = FIELD.sub(lambda found: found.group(1).replace("_", " ").lower(), query)
    text = text.replace("FROM TABLE AS TABLEalias0", "FROM table").rstrip(" ;")
    for name, value in values.items():
        text = text.replace(f'"{name}"', "'" + value.replace("'", "''") + "'")
    for name, value in values.items():
        text = re.sub(rf"\b{name}\b", "'" + value.replace("'", "''").replace("\\", "") + "'", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"SELECT (MAX|MIN|COUNT|SUM|AVG) \(? ?(.+?) ?\)? FROM", r"SELECT \1(\2) FROM", text)


def is_short(question: str, query: str, names: set[str], values: list[str]) -> bool:
    """Whether a question can be answered from what it says, in few tokens."""
    plain = 3 <= len(names) <= 6 and all(len(name) <= 24 and re.fullmatch(r"[\w ]+", name) for name in names)
    odd = " AND " in query or "WHERE" not in query or "alias" in query or "_FIELD" in query
    small = len(question) <= 90 and len(query) <= 110 and not re.search(r"\bvar\d", query)
    said = all(value.casefold() in question.casefold() for value in values)
    return plain and not odd and small and said and parse_query(query) is not None


def main(source: str, folder: str) -> None:
    """Writes the three files."""
    with bz2.open(source, "rt") as stream:
        rows = json.load(stream)
    columns: dict[str, set[str]] = defaultdict(set)
    found = list(questions(rows, columns))  # all of them first: columns are known from other questions, too
    parts: dict[str, list[dict[str, str]]] = defaultdict(list)
    for split, table, question, query, values in found:
        names = columns[table]
        if is_short(question, query, names, values):
            prompt = f"Columns: {', '.join(sorted(names))}\nQuestion: {question}\nSQL:"
            parts[split].append({"prompt": prompt, "completion": " " + query})
    for part in parts.values():
        part.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
    train, test = parts["train"], parts["test"]
    for name, kept in (("sft", train[:600]), ("prompts", train[600:3600]), ("test", test[:200])):
        (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
