"""Files larger than memory: places and hashes of rows, bounded memory, nothing left on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import ROWS, failure, lines, read, write

from tunesmith.data.sources import open_source


def test_the_hash_is_that_of_the_bytes_and_sees_one_changed_byte(tmp_path: Path) -> None:
    """Kills: hashing names, sizes or dates; hashing the first block alone."""
    content = lines([{"a": "x" * 3000}] * 3000).encode()
    file = write(tmp_path / "a.jsonl", content)
    before = open_source(file).sha256
    assert before == hashlib.sha256(content).hexdigest()
    write(tmp_path / "a.jsonl", content[:-10] + b"y" + content[-9:])
    assert open_source(file).sha256 != before


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=20),
    indent=st.none() | st.integers(0, 3),
    chunk=st.integers(1, 40),
)
@pytest.mark.slow
def test_lists_are_cut_into_the_same_rows_wherever_the_reader_stops(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], indent: int | None, chunk: int
) -> None:
    """Kills: an element cut where a chunk ends, taken for whole."""
    rows = [{"a": value, "n": number * 1.5} for number, value in enumerate(values)]
    file = tmp_path_factory.mktemp("lists") / "a.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.data.spool._CHUNK_CHARACTERS", chunk)
        patch.setattr("tunesmith.data.lines.BLOCK_BYTES", chunk)
        assert read(str(file)) == rows


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.sampled_from(['{"a": 1}', "", "  ", '{"b": [2]}\r', "oops"]), min_size=1, max_size=30),
    block=st.integers(1, 30),
)
def test_lines_begin_at_the_same_places_whatever_the_block_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], block: int
) -> None:
    """Kills: losing or doubling a line that two blocks share."""
    file = tmp_path_factory.mktemp("blocks") / "a.jsonl"
    file.write_text('{"first": 0}\n' + "\n".join(rows), "utf-8")
    numbers = [number for number, row in enumerate(rows, start=2) if row.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.data.lines.BLOCK_BYTES", block)
        source = open_source(str(file))
    assert [source.where(index) for index in range(1, len(source))] == [f"{file}:{number}" for number in numbers]


@pytest.mark.slow
def test_many_rows_are_indexed_in_eight_bytes_each(tmp_path: Path) -> None:
    """Kills: holding rows, or a list of offsets, in memory."""
    count = 300_000
    file = write(tmp_path / "a.jsonl", "".join(f'{{"text": "row {number} of many"}}\n' for number in range(count)))
    tracemalloc.start()
    source = open_source(file)
    assert source[count - 1].data == {"text": f"row {count - 1} of many"}
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert held_bytes < 10 * count + 100_000
    assert peak_bytes < 10 * count + 12_000_000


def test_a_long_list_is_spooled_in_bounded_memory(tmp_path: Path) -> None:
    """Kills: json.load of the whole file."""
    count = 30_000
    file = write(tmp_path / "a.json", json.dumps([{"text": f"row {number} " + "x" * 700} for number in range(count)]))
    tracemalloc.start()
    source = open_source(file)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(source), os.path.getsize(file) > 20_000_000) == (count, True)
    assert peak_bytes < 20_000_000


def test_permuting_rows_permutes_the_source_and_changes_nothing_else(tmp_path: Path) -> None:
    """Kills: a schema guessed from the first rows (a cast, a column filled with null)."""
    rows: list[dict[str, Any]] = [{"a": 1}, {"a": "1"}, {"b": [1, "x"]}, {"a": None}, {"a": 1.0}]
    for name in ("a.jsonl", "a.json"):
        dumped = (lines, json.dumps)[name.endswith("json")]
        forward, backward = (read(write(tmp_path / name, dumped(listed))) for listed in (rows, rows[::-1]))
        assert [repr(row) for row in forward] == [repr(row) for row in backward[::-1]] == [repr(row) for row in rows]


def test_a_number_is_not_cut_where_a_chunk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: taking the first digits of a number for the whole of it."""
    monkeypatch.setattr("tunesmith.data.spool._CHUNK_CHARACTERS", 3)
    assert "a number (12345)" in failure(write(tmp_path / "a.json", "[12345, 6]")).message


def test_no_temporary_file_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    source = open_source(write(tmp_path / "a.json", json.dumps(ROWS)))
    assert source[0].data == ROWS[0]
    assert not list((tmp_path / "tmp").iterdir())
