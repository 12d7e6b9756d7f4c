"""`layout: auto`: who is chosen, for how many processes, and where that is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from killing import prepare
from test_launch import ended, write

from tunesmith.config import build_config
from tunesmith.core.files import read_json
from tunesmith.core.yaml import read_yaml
from tunesmith.parallel.limits import refusals
from tunesmith.plan import room
from tunesmith.run import spreading
from tunesmith.run.folder import RunFolder
from tunesmith.run.spreading import choose, possible


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("spreading"))


def config(folder: Path, **changes: Any) -> Any:
    base = {"model": str(folder / "model"), "data": {"train": str(folder / "train.jsonl")}, "out": str(folder / "out")}
    return build_config(base | {"layout": "auto", "train": {"steps": 1, "rows_per_step": 8}} | changes)


def test_what_is_possible_is_what_the_limits_leave(folder: Path) -> None:
    """Kills: a layout that `tune` refuses; one that is forgotten."""
    for changes in ({}, {"precision": {"compute": "fp16"}}, {"data": {"train": "x", "packing": False}}):
        given = config(folder, **changes)
        for section in possible(given, 4):
            assert section.processes == 4
            assert not list(refusals(given.model_copy(update={"layout": section})))
    kinds = {(one.tensor, one.pipeline, one.shard) for one in possible(config(folder), 2)}
    assert {(1, 1, "none"), (1, 1, "zero1"), (1, 1, "zero2"), (1, 1, "zero3"), (1, 2, "none")} <= kinds
    assert [one.shard for one in possible(config(folder, method="bitfit"), 2)] == ["none"]


def test_replicas_are_taken_where_they_fit_and_what_splits_more_where_they_do_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a ranking that ignores memory; a split that gains nothing."""
    given = config(folder, method="full")
    assert choose(given, 1)["layout"] == {**choose(given, 1)["layout"], "data": 1, "shard": "none"}
    roomy = choose(given, 2)
    assert (roomy["layout"]["data"], roomy["layout"]["shard"]) == (2, "none")
    assert roomy["why"].startswith("layout: data 2: ")
    pieces = spreading.machine
    needed: list[int] = []
    for room_bytes in range(2_000_000, 100_000, -100_000):
        monkeypatch.setattr(room, "room_bytes", lambda given=room_bytes: given)
        found = choose(given, 2)
        if found["layout"] != roomy["layout"]:
            needed.append(room_bytes)
    assert needed
    assert pieces(2).devices == 2
    monkeypatch.setattr(room, "room_bytes", lambda: 1000)
    assert "lacks least" in choose(given, 2)["why"]


def test_the_chosen_layout_is_written_and_a_resumed_run_keeps_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a run folder that says auto; a resumed run that is spread in another way."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
    words = ("layout=auto", "train.steps=2", "train.stop=null", "evaluate.every=0", "evaluate.metrics=[]", "out=auto")
    code, _, told = ended(capsys, "tune", "lora.yaml", *words)
    assert (code, told.count("layout: one process: ")) == (0, 1)
    layout = read_yaml(folder / "auto/config.yaml")["layout"]
    assert layout == read_json(folder / "auto/run.json")["layout"]
    assert (layout["data"], layout["shard"]) == (1, "none")

    class Two:
        size, is_first = 2, True

        def first(self, made: Any) -> Any:
            return made()

    other = RunFolder(folder / "other")
    other.path.mkdir()
    begun = config(folder, layout={"data": 2, "shard": "zero2"})
    other.write_config(begun)
    again, why = spreading.settled(config(folder), other, Two())  # type: ignore[arg-type]
    assert again.layout == begun.layout
    assert "as the run was begun" in why


def test_launch_needs_to_know_how_many_processes_auto_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "auto")
    code, out, _ = ended(capsys, "launch", str(path), "--processes", "2")
    assert (code, out) == (0, f"torchrun --standalone --nproc-per-node 2 -m tunesmith tune {path}\n")
    assert ended(capsys, "launch", str(path))[0] == 2
    code, _, told = ended(capsys, "launch", str(write(tmp_path, "{data: 2}")), "--processes", "2")
    assert code == 2
    assert "--processes: 2 has no effect" in told
