"""Bundled sets: train and test never share a row and never move; the real ones are what their tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, ResourceError
from tunesmith.core.files import canonical_json
from tunesmith.data import bundled
from tunesmith.data.bundled import BUNDLED, in_test
from tunesmith.data.formats import FORMATS, convert, format_of
from tunesmith.data.rows import Dialogue
from tunesmith.data.sources import open_source


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Archives that hold a few rows of our own; the names of the packages that were asked for."""
    asked: list[str] = []
    articles = [" ".join(f"Sentence {number} of {topic}." for number in range(200)) for topic in "abcdefgh"]

    def conversations(topic: int) -> dict[str, Any]:
        said = [("human", f"Opening {topic % 40}"), ("gpt", "Sure."), ("human", "Do it.")]
        for number in range(topic % 3):
            call = json.dumps({"name": f"do_{topic}", "arguments": {"number": number}})
            said += [("function_call", call), ("observation", "{}"), ("gpt", "Done."), ("human", "Again.")]
        said = said[:-1] if topic % 3 else [*said, ("gpt", "No.")]
        tools = json.dumps([{"name": f"do_{topic}"}])
        return {"conversations": [{"from": side, "value": text} for side, text in said], "tools": tools}

    alpaca = [{"instruction": f"Say {number % 350}", "input": "", "output": "ok"} for number in range(400)]
    files = {
        "alpaca_en_demo.json": json.dumps(alpaca),
        "glaive_toolcall_en_demo.json": json.dumps([conversations(topic) for topic in range(90)] * 2),
        "wiki_demo.txt": "\n".join(articles),
    }

    def fetch(name: str, version: str, sha256: str, members: dict[str, Path], **_: Any) -> None:
        asked.append(name)
        for member, file in members.items():
            file.write_text(files[Path(member).name])

    monkeypatch.setattr(bundled, "fetch_members", fetch)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return asked


def rows_of(name: str) -> list[dict[str, Any]]:
    source = open_source(name)
    return [source[index].data for index in range(len(source))]


def test_train_and_test_are_the_whole_and_share_no_row(packages: list[str]) -> None:
    """Kills: a split by place, which puts equal rows on both sides."""
    train, test = rows_of("alpaca-demo"), rows_of("alpaca-demo:test")
    assert len(train) + len(test) == 400
    assert len({canonical_json(row) for row in train + test}) == 350
    assert not {canonical_json(row) for row in train} & {canonical_json(row) for row in test}
    assert 10 < len(test) < 80


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3), max_size=20))
def test_a_side_depends_on_the_row_alone(rows: list[dict[str, str]]) -> None:
    """Kills: a split that moves when rows are added, taken away, or have their keys in another order."""
    chosen = [in_test(row, 0.5) for row in rows]
    assert [in_test(dict(reversed(row.items())), 0.5) for row in rows[::-1]] == chosen[::-1]
    assert all(in_test(row, 1.0) and not in_test(row, 0.0) for row in rows)


def test_test_rows_of_tool_calls_judge_one_call_each(packages: list[str]) -> None:
    """Kills: judging what was said before the call; conversations of one opening on both sides."""
    train, test = rows_of("toolcall-demo:train"), rows_of("toolcall-demo:test")
    openings = [{row["messages"][1]["content"] for row in part} for part in (train, test)]
    assert openings[0]
    assert openings[1]
    assert not openings[0] & openings[1]
    assert len({canonical_json(row) for row in train + test}) == len(train) + len(test)
    for row in test:
        made = convert(row, "messages", "")
        assert isinstance(made, Dialogue)
        assert [turn.supervised for turn in made.messages].count(True) == 1
        assert json.loads(made.completion)["name"].startswith("do_")
    assert all(row["messages"][-1]["content"] == "Done." for row in train)


def test_pieces_of_an_article_stay_together(packages: list[str]) -> None:
    """Kills: splitting pieces one by one."""
    sides = [{row["text"].split()[-1] for row in rows_of(f"wiki-demo:{part}")} for part in ("train", "test")]
    assert not sides[0] & sides[1]
    pieces = [row["text"] for part in ("train", "test") for row in rows_of(f"wiki-demo:{part}")]
    assert all(len(piece) <= 1500 for piece in pieces)
    assert sum(piece.count("Sentence") for piece in pieces) == 8 * 200


def test_an_archive_is_fetched_once_and_kept(packages: list[str], tmp_path: Path) -> None:
    first = open_source("alpaca-demo").sha256
    assert open_source("alpaca-demo").sha256 == first
    assert len(open_source("alpaca-demo:test#3")) == 3
    assert packages == ["llamafactory"]
    assert open_source("alpaca-demo")[0].where == "alpaca-demo:1"


def test_a_conversion_that_fails_leaves_nothing_behind(
    packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a half-written set that the next run takes for whole."""

    def broken(*_: Any, **__: Any) -> None:
        raise ResourceError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(bundled, "fetch_members", broken)
        with pytest.raises(ResourceError):
            open_source("alpaca-demo")
    assert not list((tmp_path / "cache" / "data").iterdir())
    assert len(open_source("alpaca-demo")) > 0


def test_a_changed_rule_is_another_cache(packages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a cache that is named by the set alone."""
    before = bundled.open_part("alpaca-demo")[0]
    monkeypatch.setattr(bundled, "RULES", bundled.RULES + 1)
    assert bundled.open_part("alpaca-demo")[0] != before


def test_a_part_that_does_not_exist_is_named(packages: list[str]) -> None:
    with pytest.raises(DataError, match="lambada has no part 'train'; there is test"):
        open_source("lambada:train")


def test_the_table_is_complete() -> None:
    for found in BUNDLED.values():
        assert len(found.package.sha256) == 64
        assert found.format in ("auto", *FORMATS)
        assert found.about


COUNTS = {
    "alpaca-demo": {"train": 901, "test": 98},
    "toolcall-demo": {"train": 64, "test": 100, "calls": 91},
    "dpo-demo": {"train": 236, "test": 64},
    "kto-demo": {"train": 243, "test": 57},
    "c4-demo": {"train": 251, "test": 49},
    "wiki-demo": {"train": 687, "test": 80},
    "lambada": {"test": 5153},
    "mmlu": {"test": 14042, "train": 285},
}


@pytest.mark.real
@pytest.mark.parametrize("name", BUNDLED)
def test_the_real_sets_have_the_rows_that_are_written_down(name: str) -> None:
    """A count that moves means that published figures are of other rows."""
    sides: list[set[str]] = []
    for part, count in COUNTS[name].items():
        source = open_source(f"{name}:{part}")
        assert len(source) == count
        rows = [source[index] for index in range(count)]
        sides.append({canonical_json(row.data) for row in rows})
        form = format_of(source)
        assert all(convert(row.data, form, row.where) for row in rows)
    assert len(sides) == 1 or not sides[0] & sides[1]


@pytest.mark.real
def test_the_real_function_calls_are_json_in_every_test_row() -> None:
    source = open_source("toolcall-demo:test")
    for index in range(len(source)):
        made = convert(source[index].data, "messages", "")
        assert isinstance(made, Dialogue)
        call = json.loads(made.completion)
        assert set(call) == {"name", "arguments"}
        assert call["name"] in made.messages[0].content
