"""Queries: what counts as the same one, what it gives on a table, and what it may not do there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.formats import convert
from tunesmith.data.rows import Dialogue
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.metrics.execution import opened, read_table, result
from tunesmith.evaluate.metrics.wikisql import Query, parse_query
from tunesmith.run.exam import grouped

TABLE = {
    "header": ["Player", "Club", "Goals", "No. of caps"],
    "rows": [
        ["Ra\u00fal", "Rayo Vallecano", 40, "5"],
        ["Pepe", "Real and Sons", 12, "7"],
        ["Jos\u00c9", "Rayo Vallecano", 38, None],
    ],
}
SPEC = json.dumps(TABLE)
GOLD = "SELECT COUNT(player) FROM table WHERE club = 'Rayo Vallecano' AND goals > 37"
SAME = [
    "select count ( Player )  from table where goals>37 and club=\"rayo vallecano\";",
    'SELECT COUNT("Player") FROM "table" WHERE [Club] = Rayo Vallecano AND `Goals` > 37',
    "SELECT COUNT(T1.player) FROM table AS T1 WHERE T1.club = 'Rayo Vallecano' AND T1.goals > 37",
]  # fmt: skip
OTHER = [
    "SELECT player FROM table WHERE club = 'Rayo Vallecano' AND goals > 37",
    "SELECT COUNT(club) FROM table WHERE club = 'Rayo Vallecano' AND goals > 37",
    "SELECT COUNT(player) FROM table WHERE club = 'Rayo Vallecano' AND goals < 37",
    "SELECT COUNT(player) FROM table WHERE club = 'Rayo Vallecano' AND goals > 38",
    "SELECT COUNT(player) FROM table WHERE club = 'Rayo Vallecano'",
    "SELECT COUNT(player) FROM table",
    "I do not know",
    "",
]
JSON_GOLD = {"sel": 0, "agg": 3, "conds": [[1, 0, "Rayo Vallecano"], [2, 1, 37]]}


def score(name: str, answers: list[str], references: list[str], table: str = SPEC) -> float:
    metric = METRICS.load(name)()
    metric.tables = [table] * len(answers)
    return float(metric.score(answers, [[reference] for reference in references]).value)


@pytest.mark.parametrize("answer", [*SAME, GOLD])
def test_the_same_query_written_otherwise_is_the_same(answer: str) -> None:
    """Kills: conditions in order; case; quotes."""
    assert parse_query(answer) is not None
    assert parse_query(answer) == parse_query(GOLD)
    assert score("logical_form", [answer], [GOLD]) == 100.0


@pytest.mark.parametrize("answer", OTHER)
def test_another_query_is_another(answer: str) -> None:
    """Kills: a part that is not compared; answers that are no query counted as right."""
    assert score("logical_form", [answer], [GOLD]) == 0.0


PLACED = "SELECT COUNT col0 FROM table WHERE col2 > 37 AND col1 = Rayo Vallecano"
NAMED = {"sel": "Player", "agg": "count", "conds": [["Goals", ">", 37], ["club", "=", "rayo vallecano"]]}


@pytest.mark.parametrize("given", [JSON_GOLD, {"query": JSON_GOLD}, NAMED])
def test_the_json_of_the_data_set_is_the_same_query(given: dict[str, Any]) -> None:
    """Kills: places from one; names and places that never meet."""
    text = json.dumps(given)
    assert score("logical_form", [text], [GOLD]) == 100.0
    assert score("logical_form", [text], [PLACED]) == 100.0
    assert score("logical_form", [text], [GOLD if given is NAMED else PLACED], "") == 100.0
    assert score("logical_form", [text], [PLACED if given is NAMED else GOLD], "") == 0.0, (
        "no table says which is which"
    )


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"sel": 0}', '{"sel": true, "conds": []}', '{"sel": 0, "conds": [[1]]}', '{"agg": 9, "sel": 0}'],
)
def test_broken_json_is_no_query(text: str) -> None:
    assert parse_query(text) is None


def test_a_value_may_hold_the_word_and() -> None:
    """Kills: a value cut at AND, in quotes or without."""
    wanted = Query("player", "", frozenset({("club", "=", "real and sons"), ("goals", "<", "20")}))
    assert parse_query("SELECT player FROM table WHERE club = Real and Sons AND goals < 20") == wanted
    assert parse_query("SELECT player FROM table WHERE club = 'Real and Sons' AND goals < 20") == wanted
    assert parse_query('SELECT player FROM table WHERE club = "Real AND Sons" AND goals < 20') == wanted


def test_a_name_may_hold_it_too() -> None:
    wanted = Query("who-two", "", frozenset({("you and i", "=", "a and b"), ("richmond [staten is.]", "=", "35%")}))
    assert (
        parse_query("SELECT who-two FROM table WHERE you and i = 'a and b' AND richmond [staten is.] = 35%") == wanted
    )


def test_names_may_hold_brackets_dots_and_underscores() -> None:
    wanted = Query("population (2011)", "MAX", frozenset({("no. of caps", "=", "5")}))
    assert parse_query("SELECT MAX(Population_(2011)) FROM table WHERE No. of caps = 5") == wanted
    assert parse_query("SELECT MAX(population (2011)) FROM table WHERE NO._OF_CAPS = '5'") == wanted


@pytest.mark.parametrize(
    "text", ["SELECT " * 5000, "SELECT a FROM t WHERE " + "a = 1 AND " * 150, "SELECT" + " " * 1900 + "x"]
)
def test_hostile_text_is_read_quickly(text: str) -> None:
    """Kills: a regular expression that never ends."""
    began = time.monotonic()
    parse_query(text)
    assert time.monotonic() - began < 1.0


def rows_of(text: str) -> list[Any] | None:
    table = read_table(SPEC)
    with opened(table) as database:
        found = result(database, table, text)
    return None if found is None else sorted(found.elements(), key=repr)


def test_a_query_gives_what_the_table_holds() -> None:
    """Kills: numbers compared as text; case that matters; a column chosen by another's name."""
    assert rows_of(GOLD) == [(2,)]
    assert rows_of(json.dumps(JSON_GOLD)) == [(2,)]
    assert rows_of("SELECT player FROM table WHERE goals > 5") == [("jos\u00e9",), ("pepe",), ("ra\u00fal",)]
    assert rows_of("SELECT player FROM table WHERE no. of caps = 7") == [("pepe",)]
    assert rows_of("SELECT player FROM table WHERE player = 'JOS\u00c9'") == [("jos\u00e9",)]
    assert rows_of("SELECT AVG(goals) FROM table WHERE club = 'rayo vallecano'") == [(39.0,)]
    assert rows_of("SELECT col2 FROM table WHERE col3 > 5") == [(12,)]
    assert rows_of('SELECT "club", COUNT(*) FROM table GROUP BY club HAVING COUNT(*) > 1') == [("rayo vallecano", 2)]
    assert rows_of("SELECT nothing FROM table") is None
    assert rows_of("SELECT col9 FROM table") is None


def test_execution_forgives_another_way_to_the_same_result() -> None:
    """Kills: execution that is logical form; an order of rows that matters; a failed query equal to another."""
    other = "SELECT COUNT(club) FROM table WHERE goals > 30"
    assert score("execution", [other], [GOLD]) == 100.0
    assert score("logical_form", [other], [GOLD]) == 0.0
    assert score("execution", ["SELECT player FROM table ORDER BY goals DESC"], ["SELECT player FROM table"]) == 100.0
    assert score("execution", ["SELECT a, b FROM nowhere", "", "SELECT 1/0 FROM", GOLD], [GOLD] * 4) == 25.0
    with pytest.raises(DataError, match="does not run on its table"):
        score("execution", [GOLD], ["SELECT x FROM nowhere"])
    with pytest.raises(DataError, match="needs the table of each row"):
        score("execution", [GOLD], [GOLD], "")


@pytest.mark.parametrize(
    "text",
    [
        "PRAGMA table_info('table')",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "SELECT load_extension('x')",
        "DROP TABLE \"table\"",
        "INSERT INTO \"table\" VALUES (1, 2, 3, 4)",
        "CREATE TABLE x (a)",
        "SELECT name, sql FROM sqlite_master",
        "SELECT name, type FROM pragma_table_info('table')",
        "SELECT readfile('/etc/passwd')",
        "SELECT randomblob(900000) FROM table",
        "SELECT group_concat(player) FROM table",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c",
        "SELECT 1; DROP TABLE \"table\"",
        "BEGIN",
        "VACUUM INTO '/tmp/x.db'",
    ],
)  # fmt: skip
def test_a_query_may_read_its_table_and_nothing_else(text: str) -> None:
    """Kills: an authorizer that is not set, or lets one of these through."""
    table = read_table(SPEC)
    with opened(table) as database:
        assert result(database, table, text) is None
        assert result(database, table, "SELECT COUNT(*) FROM table") is not None, "and the table is as it was"


def test_a_query_that_does_not_end_is_stopped() -> None:
    """Kills: a limit of rows that are fetched alone."""
    table = read_table(json.dumps({"header": ["a"], "rows": [[number] for number in range(3000)]}))
    joined = ", ".join(f'"table" t{number}' for number in range(6))
    with opened(table) as database:
        began = time.monotonic()
        assert result(database, table, f"SELECT COUNT(*) FROM {joined}") is None
        assert time.monotonic() - began < 5.0
        assert result(database, table, f"SELECT t0.a FROM {joined}") is None, "too many rows"


def test_tables_come_in_the_row_or_in_files(tmp_path: Path) -> None:
    """Kills: a broken table that becomes an empty one."""
    (tmp_path / "one.json").write_text(SPEC)
    (tmp_path / "all.jsonl").write_text(json.dumps({"id": "1-2", "types": [], **TABLE}) + "\n")
    wanted = read_table(SPEC)
    assert read_table(str(tmp_path / "one.json")) == wanted == read_table(f"{tmp_path / 'all.jsonl'}#1-2")
    broken = [f"{tmp_path / 'all.jsonl'}#9", str(tmp_path / "none.json"), '{"header": [], "rows": []}']
    for spec in [*broken, '{"header": ["a"], "rows": [[1, 2]]}']:
        with pytest.raises(DataError):
            read_table(spec)


def test_a_row_brings_its_table_to_the_metric() -> None:
    """Kills: one question about two tables taken for one with two answers."""
    raw = {"prompt": "How many?", "completion": GOLD, "table": TABLE}
    one, two = (convert({**raw, "table": table}, "prompt_completion", "a:1") for table in (TABLE, "tables.jsonl#7"))
    assert isinstance(one, Dialogue)
    assert isinstance(two, Dialogue)
    assert read_table(one.table).header == tuple(TABLE["header"])
    assert [row.table for row in grouped([one, two, two])] == [one.table, "tables.jsonl#7"]
    with pytest.raises(DataError, match="'table' holds"):
        convert({**raw, "table": 3}, "prompt_completion", "a:1")
