"""Execution accuracy: a query is right when it gives what the reference gives, on the table that its row carries.

The one idea: SQL that a model wrote runs in a database in memory that holds this one table, where nothing but reading
is allowed, for a limited time and to a limited size. Whether two queries are one is `wikisql.py`.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.files import read_json, strict_loads
from tunesmith.evaluate.metrics.metric import References, RowMean
from tunesmith.evaluate.metrics.wikisql import Query, parse_query

SECONDS, ROWS, CELLS, BYTES = 1.0, 10_000, 2_000_000, 1_000_000
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
# what computes a value from values; nothing that opens, loads, waits or makes something large of something small
_FUNCTIONS = {
    "abs", "avg", "ceil", "coalesce", "count", "date", "floor", "ifnull", "instr", "julianday", "length", "like",
    "lower", "ltrim", "max", "min", "nullif", "round", "rtrim", "sign", "strftime", "substr", "substring", "sum",
    "total", "trim", "typeof", "upper",
}  # fmt: skip
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 10,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_FROM_TABLE = re.compile(r"\bFROM\s+table\b", re.I)


@dataclass(frozen=True)
class Table:
    """Names of columns and rows of values (text, numbers, None)."""

    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


class Execution(RowMean):
    """Share of queries with the result of the reference: the same rows, in any order, case aside."""

    name = "execution"
    reads_tables = True

    @property
    def signature(self) -> str:
        return f"sqlite|result:multiset of rows|case:lower|limit:{SECONDS:g} s|refs:any|scale:100"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        """Raises DataError for a row without a table, or whose references do not run on it."""
        if not self.tables or not all(self.tables):
            hint = 'rows need a key "table": {"header": [...], "rows": [[...], ...]}, or the path of such a JSON file'
            raise DataError("execution needs the table of each row", where="evaluate.metrics", hint=hint)
        return [
            100.0 * _right(text, several, table)
            for text, several, table in zip(completions, references, self.tables, strict=True)
        ]


def _right(text: str, references: Sequence[str], spec: str) -> bool:
    table = read_table(spec)
    with opened(table) as database:
        wanted = [result(database, table, reference) for reference in references]
        if all(one is None for one in wanted):
            raise DataError(f"the reference {references[0][:200]!r} does not run on its table", where="data.eval")
        found = result(database, table, text)
    return found is not None and found in wanted


def result(database: sqlite3.Connection, table: Table, text: str) -> Counter[tuple[Any, ...]] | None:
    """The rows that a query gives, as often as each is there; None where it is refused, fails or takes too long."""
    query = parse_query(text)
    compiled = None if query is None else compile_query(query, table)
    # what is not of WikiSQL's form runs as it is written
    statement, values = compiled or (_FROM_TABLE.sub('FROM "table"', text.strip().rstrip(";")), ())
    ends = time.monotonic() + SECONDS
    database.set_progress_handler(lambda: int(time.monotonic() > ends), 10_000)
    try:
        found = database.execute(statement, values).fetchmany(ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None
    return None if len(found) > ROWS else Counter(tuple(map(_plain, row)) for row in found)


def compile_query(query: Query, table: Table) -> tuple[str, tuple[str, ...]] | None:
    """A query as SQL over `table` with its values apart; None where it names a column that is not there."""
    placed = query.placed(table.header)
    conditions = sorted(placed.conditions)
    columns = [placed.column, *(column for column, _, _ in conditions)]
    places = [int(name[3:]) if re.fullmatch(r"col\d{1,6}", name) else -1 for name in columns]
    if placed.column == "*" and placed.aggregation in ("", "COUNT"):
        selected, places = "*", places[1:]
    elif 0 <= places[0] < len(table.header):
        selected, places = _identifier(table.header, places[0]), places[1:]
    else:
        return None
    if not all(0 <= place < len(table.header) for place in places):
        return None
    selected = f"{placed.aggregation}({selected})" if placed.aggregation else selected
    tests = [
        f"{_identifier(table.header, place)} {operator} ?"
        for place, (_, operator, _) in zip(places, conditions, strict=True)
    ]
    where = f" WHERE {' AND '.join(tests)}" if tests else ""
    return f'SELECT {selected} FROM "table"{where}', tuple(value for _, _, value in conditions)


@contextmanager
def opened(table: Table) -> Iterator[sqlite3.Connection]:
    """A database in memory with the table `table`, which can be read and nothing else."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        columns = [f"{_identifier(table.header, place)} {_type(table, place)}" for place in range(len(table.header))]
        database.execute(f'CREATE TABLE "table" ({", ".join(columns)})')
        database.executemany(f'INSERT INTO "table" VALUES ({", ".join("?" * len(table.header))})', table.rows)
        for limit, value in _LIMITS.items():
            database.setlimit(limit, value)
        database.set_authorizer(_authorize)
        yield database


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
    if action not in _READING:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").casefold() not in _FUNCTIONS:
        return sqlite3.SQLITE_DENY
    # the schema itself, and tables that are functions, are no data
    other = action == sqlite3.SQLITE_READ and first not in ("table", None, "")
    return sqlite3.SQLITE_DENY if other else sqlite3.SQLITE_OK


def _identifier(header: Sequence[str], place: int) -> str:
    """A column's name in quotes; one that is there twice, case aside, gets its place behind it."""
    names = [name.casefold() for name in header]
    name = header[place] if names.index(names[place]) == place else f"{header[place]} {place}"
    return '"' + name.replace('"', '""').replace("\0", "") + '"'


def _type(table: Table, place: int) -> str:
    values = [row[place] for row in table.rows if row[place] is not None]
    return "NUMERIC" if values and all(map(_is_number, values)) else "TEXT COLLATE NOCASE"


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value) is not None
    return isinstance(value, int | float)


def _plain(value: Any) -> Any:
    return " ".join(value.split()).casefold() if isinstance(value, str) else value


# tables


@lru_cache(256)
def read_table(spec: str) -> Table:
    """A table from JSON {header, rows}, from the path of such a file, or from `file.jsonl#id` as WikiSQL has them.

    Raises DataError for anything else.
    """
    found: Any
    if spec.startswith("{"):
        where, found = "table", json.loads(spec)
    else:
        path, _, key = spec.partition("#")
        where = spec
        found = read_json(Path(path), DataError) if not key else _lines(path).get(key)
    return _table(found, where)


@lru_cache(4)
def _lines(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            tables = [strict_loads(line) for line in stream if line.strip()]
        return {str(table["id"]): table for table in tables}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"no file of tables with an id each: {error}", where=path) from error


def _table(found: Any, where: str) -> Table:
    header: Any = found.get("header") if isinstance(found, dict) else None
    rows: Any = found.get("rows") if isinstance(found, dict) else None
    if not _is_header(header) or not isinstance(rows, list) or not all(_is_row(row, len(header)) for row in rows):
        raise DataError("a table is {header: [names], rows: [[values], ...]} with a value for each column", where=where)
    if len(rows) * len(header) > CELLS:
        raise DataError(f"a table of more than {CELLS} values", where=where)
    return Table(tuple(header), tuple(tuple(map(_cell, row)) for row in rows))


def _is_header(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(name, str) for name in found)


def _is_row(found: Any, columns: int) -> bool:
    fits = isinstance(found, list) and len(found) == columns
    return fits and all(cell is None or isinstance(cell, str | int | float) for cell in found)


def _cell(cell: Any) -> Any:
    if isinstance(cell, str):
        return _plain(cell)
    # whole numbers that SQLite cannot hold
    return float(cell) if isinstance(cell, int) and abs(cell) >= 2**63 else cell
