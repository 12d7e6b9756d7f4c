"""Files of every kind read as the same rows; what is wrong with one is named with its line."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from row_files import ROWS, failure, lines, read, write

from tunesmith.core.errors import TunesmithError
from tunesmith.data.formats import format_of
from tunesmith.data.sources import open_source


def as_csv(rows: list[dict[str, Any]]) -> str:
    cells = [["instruction", "input", "output"], *([row[key] for key in row] for row in rows)]
    return "\r\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


ACCEPTED = {
    "plain.jsonl": lines(ROWS),
    "not_ascii.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS).encode(),
    "crlf.jsonl": lines(ROWS).replace("\n", "\r\n"),
    "old_mac.jsonl": lines(ROWS).replace("\n", "\r"),
    "blank_lines.jsonl": "\n\n" + lines(ROWS).replace("\n", "\n \n\t\n"),
    "no_last_newline.jsonl": lines(ROWS).strip(),
    "named.json": lines(ROWS),
    "list.json": json.dumps(ROWS),
    "list.jsonl": json.dumps(ROWS),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=4).replace("\n", "\r\n").encode(),
    "table.csv": b"\xef\xbb\xbf" + as_csv(ROWS).encode(),
    "table.tsv": as_csv(ROWS).replace('","', '"\t"'),
    "semicolons.csv": as_csv(ROWS).replace('","', '";"'),
    "packed.jsonl.gz": gzip.compress(lines(ROWS).encode()),
    "packed.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "unknown_ending": lines(ROWS),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    """Kills: keeping a BOM or CR, splitting at U+2028, counting blank lines as rows."""
    assert read(write(tmp_path / name, ACCEPTED[name])) == ROWS


def test_parquet_and_arrow_hold_the_same_rows(tmp_path: Path) -> None:
    import pyarrow

    assert read(as_parquet(tmp_path / "rows.parquet", ROWS)) == ROWS
    table = pyarrow.Table.from_pylist(ROWS)
    for name, opened in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with opened(tmp_path / name, table.schema) as out:
            out.write_table(table)
        assert read(str(tmp_path / name)) == ROWS


def test_text_files_give_a_row_a_line(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\n  two \n")) == [{"text": "one"}, {"text": "  two "}]


def test_places_name_the_line_of_the_file(tmp_path: Path) -> None:
    """Kills: numbering rows instead of lines; counting lines of quoted cells wrongly."""
    file = write(tmp_path / "a.jsonl", "\n" + lines([{"a": 1}]) + "\n\n" + lines([{"a": 2}, {"a": 3}]))
    assert [open_source(file)[row].where for row in range(3)] == [f"{file}:2", f"{file}:5", f"{file}:6"]
    file = write(tmp_path / "a.csv", 'a,b\n1,"x\ny"\n2,z\n')
    assert [open_source(file)[row].where for row in range(2)] == [f"{file}:2", f"{file}:4"]
    file = write(tmp_path / "a.json", json.dumps([{"a": 1}, {"a": 2}], indent=1))
    assert [open_source(file)[row].where for row in range(2)] == [f"{file}:2 (row 1)", f"{file}:5 (row 2)"]
    file = as_parquet(tmp_path / "a.parquet", [{"a": 1}, {"a": 2}])
    assert open_source(file)[1].where == f"{file} (row 2)"


BAD_ROWS = {
    "truncated": ('{"a": "b', "ends too early"),
    "list": ("[1, 2]", "this is a list"),
    "number": ("17", "a number (17)"),
    "null": ("null", "null"),
    "text": ('"hello"', "a text"),
    "duplicate key": ('{"a": 1, "a": 2}', "'a' appears twice"),
    "NaN": ('{"a": NaN}', "NaN is not JSON"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not JSON"),
    "5000 digits": ('{"a": ' + "9" * 5000 + "}", "4,300 digits"),
    "deep": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "rather deep": ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
    "single quotes": ("{'a': 1}", "not JSON"),
    "raw control character": ('{"a": "x\ty"}', "not JSON"),
    "half a pair": ('{"a": "\\ud83d"}', "surrogate"),
    "two objects": ('{"a": 1} {"b": 2}', "not JSON: Extra data at character 10"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_damaged_row_is_named_with_its_line_and_leaves_the_others(tmp_path: Path, name: str) -> None:
    """Kills: json.loads in place of the strict reader; an error for the whole file."""
    text, expected = BAD_ROWS[name]
    file = write(tmp_path / "a.jsonl", lines([{"a": 0}]) + text + "\n" + lines([{"a": 9}]))
    error = failure(file, 1)
    assert error.where == f"{file}:2"
    assert expected in error.message
    assert len(error.message) < 200
    assert open_source(file)[2].data == {"a": 9}


def test_a_bad_byte_is_an_error_of_its_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n')
    assert failure(file, 1).where.endswith(":2")
    assert "not UTF-8 at byte 8" in failure(file, 1).message
    file = write(tmp_path / "a.txt", b"good\nb\xffd\n")
    assert "not UTF-8" in failure(file, 1).message


def test_a_file_of_its_own_kind_has_the_same_complaints(tmp_path: Path) -> None:
    """Kills: reading a JSON list, CSV or Parquet file less strictly than JSON lines."""
    file = write(tmp_path / "a.json", '[{"a": 1}, 7, {"a": NaN}, {"a": 1, "a": 2}]')
    assert "a number (7)" in failure(file, 1).message
    assert "NaN" in failure(file, 2).message
    assert "twice" in failure(file, 3).message
    file = write(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n4,5\n")
    assert (failure(file, 1).where, failure(file, 1).message) == (f"{file}:3", "3 cells, but the first line names 2")
    assert open_source(file)[2].data == {"a": "4", "b": "5"}
    file = as_parquet(tmp_path / "a.parquet", [{"a": 1.0}, {"a": float("nan")}])
    assert "NaN" in failure(file, 1).message


REFUSED = {
    "empty.jsonl": (b"", "no rows"),
    "blank.jsonl": (b" \n\n\t\n", "no rows"),
    "bom_only.jsonl": (b"\xef\xbb\xbf", "no rows"),
    "empty.json": (b"[]", "no rows"),
    "header_only.csv": (b"a,b\n", "no rows"),
    "empty.csv": (b"", "no rows"),
    "utf16.jsonl": (lines(ROWS).encode("utf-16"), "UTF-16"),
    "utf16_without_bom.jsonl": (lines(ROWS).encode("utf-16-le"), "UTF-16"),
    "table.jsonl": (b"a,b\n1,2\n", "plain text or CSV"),
    "page.jsonl": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "parquet.jsonl": (b"PAR1aaaaPAR1", "holds parquet"),
    "image.json": (b"\x89PNG\r\n", "holds image"),
    "packed.jsonl": (b"PK\x03\x04abc", "packed with zip"),
    "packed.jsonl.zst": (b"\x28\xb5\x2f\xfdabc", "packed with zstd"),
    "lines.parquet": (lines(ROWS).encode(), "not Parquet or Arrow: the file holds JSON lines"),
    "damaged.parquet": (b"PAR1" + b"\0" * 50, "damaged"),
    "lines.csv": (lines(ROWS).encode(), "not CSV: the file holds JSON lines"),
    "object.json": (b'{\n "rows": [{"a": 1}]\n}', "one JSON object"),
    "truncated.json": (b'[{"a": 1},\n {"a": 2', "ends too early"),
    "unclosed.json": (b'[{"a": 1},\n {"a": 2}\n', "needs ']' here, not the end of the file"),
    "no_comma.json": (b'[{"a": 1}\n {"a": 2}]', "needs ']' here, not '{'"),
    "broken.json": (b'[{"a": 1},\n {"a" 2}, {"a": 3}' + b" " * 50 + b"]", "not JSON"),
    "more.json": (b'[{"a": 1}] 5', "more behind the end"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "digits.json": (b'[{"a": ' + b"9" * 5000 + b"}]", "too many digits"),
    "bad_byte.json": (b'[{"a": "\xff"}]', "not UTF-8"),
    "twice.csv": (b"a,a\n1,2\n", "two columns are called 'a'"),
    "nameless.csv": (b"a,\n1,2\n", "no name"),
    "quote.csv": (b'a,b\n1,"2\n', "not CSV"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS).encode() * 50)[:-20], "damaged or cut off"),
    "flipped.jsonl.gz": (gzip.compress(lines(ROWS).encode())[:-8] + b"\0" * 8, "damaged"),
    "cut.json.bz2": (bz2.compress(lines(ROWS).encode())[:-9], "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, expected = REFUSED[name]
    file = write(tmp_path / name, content)
    error = failure(file)
    assert error.where.startswith(file)
    assert expected in error.message
    assert "\n" not in error.message


def test_lines_are_named_inside_a_broken_list(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '[\n{"a": 1},\n{"a":\n oops}\n' + " " * 40 + "]")
    assert failure(file).where == f"{file}:4"
    assert "begins at line 3" in failure(file).message


def test_paths_that_are_no_files_are_refused_without_hanging(tmp_path: Path) -> None:
    """Kills: opening a pipe (it waits for ever)."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe" in failure(str(tmp_path / "pipe.jsonl")).message
    assert "pipe or a device" in failure("/dev/zero").message
    folder = failure(str(tmp_path))
    assert "folder" in folder.message
    assert "*.jsonl" in folder.hint


def test_a_missing_path_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    error = failure(str(tmp_path / "trian.jsonl"))
    assert error.message == "not found"
    assert "train.jsonl" in error.hint
    assert failure("alpaca-dmo").hint == "did you mean alpaca-demo?"
    assert failure("alpaca-demo:tset").hint == "did you mean test?"
    assert "not found" in failure("data/none.jsonl").message
    assert "not found" in failure("x" * 5000).message
    assert "not found" in failure("a\0b").message
    assert "no file matches" in failure(str(tmp_path / "*.csv")).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_matter_of_permission(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines(ROWS))
    os.chmod(file, 0)
    with pytest.raises(TunesmithError) as caught:
        open_source(file)
    assert caught.value.exit_code == 5


def test_globs_chain_files_by_name_and_counts_take_the_first_rows(tmp_path: Path) -> None:
    """Kills: the order of the file system; a subset with the name of the whole."""
    write(tmp_path / "b.jsonl", lines([{"a": 3}]))
    write(tmp_path / "a.jsonl", lines([{"a": 1}, {"a": 2}]))
    write(tmp_path / "c.csv", "a\n4\n")
    pattern = str(tmp_path / "*.jsonl")
    assert read(pattern) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert open_source(pattern)[2].where == f"{tmp_path}/b.jsonl:1"
    assert read(pattern + "#2") == [{"a": 1}, {"a": 2}]
    assert len(open_source(pattern + "#99")) == 3
    assert open_source(pattern + "#2").sha256 != open_source(pattern).sha256
    for wrong in ("#0", "#-1", "#x", "#", "#1.5"):
        assert "no number of rows" in failure(pattern + wrong).message
    assert read(write(tmp_path / "odd#5", lines([{"a": 7}]))) == [{"a": 7}]


def test_reading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", json.dumps(ROWS))
    code = (
        "import sys; from tunesmith.data.sources import open_source; from tunesmith.data.formats import format_of; "
        f"format_of(open_source({file!r})); print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_hub_id_is_asked_for_only_where_no_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: asking the network for a file that is there; a traceback without a network."""
    import datasets

    asked: list[Any] = []

    def offline(*named: Any, **more: Any) -> Any:
        asked.append((*named, more["split"]))
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", lines(ROWS))
    assert read("owner/name") == ROWS
    assert not asked
    error = failure("owner/other:main:test")
    assert asked == [("owner/other", "main", "test")]
    assert "Couldn't reach the hub" in error.message
    assert "second line" not in str(error)
    monkeypatch.setattr(datasets, "load_dataset", lambda *named, **more: [{"text": "a"}, {"text": "b"}])
    assert read("owner/other") == [{"text": "a"}, {"text": "b"}]
    assert format_of(open_source("owner/other")) == "text"
