"""What `tunesmith evaluate` asks of a run: rows are cut as the run cut them, unless somebody says otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tunesmith.run.judging import Question, judge_models

LONG = " ".join(f"word{at}" for at in range(60))


def losses(*models: str, length: int | None = None) -> list[float]:
    """What each model loses on rows that are longer than the run's; a row that is cut has another prompt."""
    question = Question("long.jsonl", ("loss",), max_length=length, precision="fp32")
    return [model["metrics"]["loss"]["value"] for model in judge_models(list(models), question)["models"]]


def test_rows_are_cut_where_the_run_cut_them(finished: Path, begin: Callable[[Path], Path]) -> None:
    """The run has 96 tokens. Kills: a length of evaluate's own; one for the run and another for the model beside it."""
    folder = begin(finished)
    row = {"instruction": LONG, "output": "it is so"}
    (folder / "long.jsonl").write_text(json.dumps(row) + "\n")
    [own], [same], [other] = losses("run"), losses("run", length=96), losses("run", length=1024)
    assert own == same
    assert own != other
    assert losses("model", "run") == losses("model", "run", length=96)
    assert losses("model") == losses("model", length=1024)


def test_several_runs_are_asked_the_same(finished: Path, begin: Callable[[Path], Path]) -> None:
    """With the longest of their lengths. Kills: rows that differ from column to column."""
    folder = begin(finished)
    (folder / "long.jsonl").write_text(json.dumps({"instruction": LONG, "output": "it is so"}) + "\n")
    config = Path(shutil.copytree("run", "other")) / "config.yaml"
    config.write_text(config.read_text().replace("max_length: 96", "max_length: 200"))
    assert losses("run", "other") == losses("run", "other", length=200)
    assert losses("run", length=200) != losses("run", length=96)
