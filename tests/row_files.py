"""Files of rows for the readers' tests, and how they are read back or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.sources import open_source

ROWS: list[dict[str, Any]] = [
    {"instruction": "Say hi", "input": "", "output": "hi\nthere"},
    {"instruction": "caf\u00e9 \u2028 \u4f60", "input": 'a "quoted", b', "output": "{[,]}"},
    {"instruction": "NUL \u0000 and \u001b[31m", "input": "", "output": "ok\ttab"},
]


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(name: str) -> list[dict[str, Any]]:
    source = open_source(name)
    return [source[index].data for index in range(len(source))]


def failure(name: str, index: int = 0) -> DataError:
    with pytest.raises(DataError) as caught:
        open_source(name)[index]
    assert caught.value.exit_code == 3
    return caught.value
