"""The configuration of a short run of a tiny model on given rows, and what the run has left, read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_encoders import write_rows

from tunesmith.config import Config, build_config


def short_run(
    folder: Path, model: Path, rows: list[dict[str, Any]], objective: Any, train: Any, evaluate: Any, **changes: Any
) -> Config:
    """A run into `folder`/run that learns from these rows with LoRA, and is judged on them."""
    data = str(write_rows(folder / "rows.jsonl", rows))
    raw: dict[str, Any] = {
        "model": str(model),
        "data": {"train": data, "eval": data},
        "method": {"kind": "lora", "rank": 4, "targets": ["q", "v", "up"]},
        "objective": objective,
        "train": train,
        "precision": {"compute": "fp32"},
        "evaluate": evaluate,
        "log": [],
        "out": str(folder / "run"),
    }
    return build_config({**raw, **changes})


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run."""
    return json.loads((folder / name).read_text())


def records(folder: Path) -> list[dict[str, Any]]:
    """A record for each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metric(folder: Path, model: str, name: str) -> float:
    """A value of the table in eval.json, of the one row whose name begins so."""
    [row] = [row for row in read(folder, "eval.json")["models"] if row["name"].startswith(model)]
    return float(row["metrics"][name]["value"])
