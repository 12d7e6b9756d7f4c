"""Queries of WikiSQL (Zhong et al. 2017, arXiv 1709.00103) and whether two of them are the same one.

The one idea: a query is a column, an aggregation and a set of conditions, as the paper's evaluation compares them: case
and order of conditions aside, values as text. Written SQL and the data set's own JSON become the same `Query`. Running
queries is `execution.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tunesmith.evaluate.metrics.metric import References, RowMean

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
_LONGEST = 2000  # characters of an answer that are read; no query of the data has so many
_SELECT = re.compile(
    r"SELECT\s+(?P<what>\S.*?)\s+FROM\s+(?P<table>\"[^\"]*\"|\[[^\]]*\]|`[^`]*`|[^\s;]+)"
    r"(?:\s+AS\s+(?P<alias>\w+))?(?:\s+WHERE\s+(?P<where>\S.*))?",
    re.I | re.S,
)
_AGGREGATE = re.compile(r"(MAX|MIN|COUNT|SUM|AVG)\s*(?:\((.*)\)|\s(\s*col\d+))", re.I | re.S)
_CONDITION = re.compile(r"(\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|[^=<>\"`\[][^=<>]*?)\s*(=|<|>)\s*(\S.*)", re.S)
_QUOTED_OR_AND = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\s+AND\s+", re.I)
_QUOTES = {'"': '"', "'": "'", "`": "`", "[": "]"}


@dataclass(frozen=True)
class Query:
    """SELECT aggregation(column) FROM table WHERE conditions.

    Attributes:
        column: its name in lower case with single spaces, or its place as `col3`.
        aggregation: one of `AGGREGATIONS`.
        conditions: (column, operator, value in lower case).
    """

    column: str
    aggregation: str
    conditions: frozenset[tuple[str, str, str]]

    def placed(self, header: Sequence[str]) -> Query:
        """The same with the places of a table's columns for their names, where it has them."""
        places = {name_of(name): f"col{place}" for place, name in reversed(list(enumerate(header)))}
        conditions = frozenset((places.get(column, column), *rest) for column, *rest in self.conditions)
        return Query(places.get(self.column, self.column), self.aggregation, conditions)  # type: ignore[arg-type]


@lru_cache(4096)
def parse_query(text: str) -> Query | None:
    """A query from SQL of this form, or from JSON {sel, agg, conds: [[column, operator, value], ...]}; else None.

    In SQL: identifiers may be in quotes of any kind and hold spaces or underscores for them; `alias.` goes; values may
    be without quotes. In JSON: columns are places or names, `agg` and operators are places or words, and an object
    under `query` or `sql` is taken for it.
    """
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    return _from_json(text) if text.startswith("{") else _from_sql(text)


def name_of(name: str) -> str:
    """A column's name as queries compare it: no quotes, single spaces for spaces and underscores, lower case."""
    return " ".join(_bare(name).replace("_", " ").split()).casefold()


class LogicalForm(RowMean):
    """Share of queries that are the reference's: the same column, aggregation and set of conditions."""

    name = "logical_form"
    reads_tables = True

    @property
    def signature(self) -> str:
        return "wikisql:select+aggregation+set of conditions|case:lower|values:text|else:text|refs:any|scale:100"

    def rows(self, completions: Sequence[str], references: References) -> list[float]:
        tables = self.tables or [""] * len(completions)
        return [
            100.0 * any(_same(text, reference, table) for reference in several)
            for text, several, table in zip(completions, references, tables, strict=True)
        ]


def _same(text: str, reference: str, table: str) -> bool:
    ours, theirs = parse_query(text), parse_query(reference)
    if ours is None or theirs is None:
        return " ".join(text.split()).rstrip("; ").casefold() == " ".join(reference.split()).rstrip("; ").casefold()
    if table:
        from tunesmith.evaluate.metrics.execution import read_table

        header = read_table(table).header
        ours, theirs = ours.placed(header), theirs.placed(header)
    return ours == theirs


# SQL


def _from_sql(text: str) -> Query | None:
    found = _SELECT.fullmatch(text.rstrip("; \n"))
    if found is None:
        return None
    alias = found["alias"]
    aggregate = _AGGREGATE.fullmatch(found["what"])
    column = (aggregate[2] or aggregate[3] or "") if aggregate else found["what"]
    conditions = [_condition(part, alias) for part in _split(found["where"] or "")]
    if not name_of(_unaliased(column, alias)) or None in conditions:
        return None
    name = aggregate[1].upper() if aggregate else ""
    return Query(name_of(_unaliased(column, alias)), name, frozenset(one for one in conditions if one is not None))


def _split(where: str) -> list[str]:
    """The conditions of a WHERE: parts between ANDs outside quotes; one without an operator is of its neighbour."""
    if not where.strip():
        return []
    parts, start = [], 0
    for found in _QUOTED_OR_AND.finditer(where):
        if found.group()[0] not in "'\"":
            parts.append((where[start : found.start()], found.group()))
            start = found.end()
    parts.append((where[start:], ""))
    joined: list[str] = []
    between = ""
    for part, following in parts:
        whole = bool(_CONDITION.fullmatch(part.strip()))
        if joined and not (whole and _CONDITION.fullmatch(joined[-1].strip())):
            joined[-1] += between + part
        else:
            joined.append(part)
        between = following
    return joined


def _condition(part: str, alias: str | None) -> tuple[str, str, str] | None:
    found = _CONDITION.fullmatch(part.strip())
    if found is None:
        return None
    return name_of(_unaliased(found[1], alias)), found[2], _value(found[3])


def _unaliased(name: str, alias: str | None) -> str:
    name = name.strip()
    return name[len(alias) + 1 :] if alias and name.casefold().startswith(f"{alias.casefold()}.") else name


def _bare(text: str) -> str:
    text = text.strip()
    closing = _QUOTES.get(text[:1])
    if closing and len(text) >= 2 and text.endswith(closing):
        return text[1:-1].replace(closing * 2, closing)
    return text


def _value(value: Any) -> str:
    return " ".join(_bare(str(value)).split()).casefold()


# JSON


def _from_json(text: str) -> Query | None:
    try:
        found = json.loads(text)
        found = found.get("query", found.get("sql", found))
        conditions = frozenset(
            (_column(column), _word(operator, OPERATORS), _value(value)) for column, operator, value in found["conds"]
        )
        return Query(_column(found["sel"]), _word(found.get("agg", 0), AGGREGATIONS), conditions)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None


def _column(given: Any) -> str:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ValueError(given)
    return f"col{given}" if isinstance(given, int) else name_of(given)


def _word(given: Any, words: Sequence[str]) -> str:
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(words):
        return words[given]
    if isinstance(given, str) and given.upper() in words:
        return given.upper()
    raise ValueError(given)
