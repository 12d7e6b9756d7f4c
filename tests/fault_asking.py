"""The program asked within the process of a test, and what its answers must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fault_cases import run_here

WHOLE = "run/adapter/adapter_model.safetensors"


def ask(line: str, code: int, *words: str) -> dict[str, Any]:
    """Runs the program here and checks its exit code, its words and that it has no trace."""
    answer = run_here(line)
    told = answer["out"] + answer["err"]
    assert answer["code"] == code, told
    for word in words:
        assert word in told, told
    assert "Traceback" not in told
    assert "bug in tunesmith" not in told
    assert code == 0 or [part.startswith("error: ") for part in answer["err"].splitlines()].count(True) == 1
    return answer


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
