"""A checkpoint is complete or absent, every byte of it is checked, and one that was announced is never lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading

import checkpoint_files
import pytest
import torch
from checkpoint_files import read
from safetensors.torch import load_file
from tiny_training import TinyTuned, run, settings

from tunesmith.core import files
from tunesmith.core.errors import CheckpointError, ResourceError
from tunesmith.train import keeper
from tunesmith.train.checkpoint import MANIFEST, MOMENTS, STATE, WEIGHTS, Checkpoints, State

FILES = (WEIGHTS, MOMENTS, STATE, MANIFEST)


def save(checkpoints: Checkpoints, step: int) -> None:
    weights = {"a": torch.full((3,), float(step)), "b": torch.arange(4.0)}
    moments = {"first/a": torch.ones(3) * step, "second/a": torch.zeros(3)}
    checkpoint_files.save(checkpoints, State(step=step, cursor={"epoch": 0, "position": step}), weights, moments)


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, 1)
    save(checkpoints, 2)
    return checkpoints


def test_what_was_saved_is_read_back(two):
    found = two.newest()
    assert found.state == State(step=2, cursor={"epoch": 0, "position": 2})
    assert (found.threads, found.torch_version) == (torch.get_num_threads(), torch.__version__)
    assert found.elapsed_seconds == 1.5
    into = {"a": torch.zeros(3), "b": torch.zeros(4)}
    read(found.path / WEIGHTS, into)
    assert torch.equal(into["a"], torch.full((3,), 2.0))


def test_the_same_state_gives_the_same_bytes(tmp_path):
    """Kills: times, paths or process ids in anything but the manifest."""
    for name in ("x", "y"):
        save(Checkpoints(tmp_path / name), 3)
    for file in (WEIGHTS, MOMENTS, STATE):
        assert (tmp_path / "x/step-000003" / file).read_bytes() == (tmp_path / "y/step-000003" / file).read_bytes()


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_byte_anywhere_is_noticed_and_the_previous_one_is_used(two, file, caplog):
    """Kills: checking sizes only; a manifest that nothing checks."""
    path = two.path(2) / file
    whole = path.read_bytes()
    for at in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=file):
            two.load(2)
    assert two.newest().state.step == 1
    assert str(path) in caplog.text
    assert "1 steps are repeated" in caplog.text


def test_every_byte_of_the_manifest_matters(two):
    """Kills: JSON that means the same with other bytes, fields that are not sealed."""
    path = two.path(2) / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            two.load(2)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "of another step"])
def test_a_damaged_file_makes_the_checkpoint_absent(two, file, damage):
    """Kills: trusting a folder because its name is right."""
    path = two.path(2) / file
    if damage == "missing":
        path.unlink()
    elif damage == "of another step":
        shutil.copy(two.path(1) / file, path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -1])
    assert two.newest().state.step == 1
    assert two.steps() == [1]
    assert (two.folder / "step-000002.damaged").is_dir()


def test_a_renamed_checkpoint_is_not_taken_for_another_step(two):
    two.path(2).rename(two.path(9))
    with pytest.raises(CheckpointError, match="holds step 2"):
        two.load(9)


def test_when_all_are_damaged_each_reason_is_listed_and_nothing_is_touched(two):
    (two.path(1) / MOMENTS).unlink()
    (two.path(2) / WEIGHTS).write_bytes(b"")
    before = sorted(str(path) for path in two.folder.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        two.newest()
    assert caught.value.exit_code == 4
    assert "step-000001/moments.safetensors: the file is missing" in str(caught.value)
    assert "step-000002/weights.safetensors: 0 bytes" in str(caught.value)
    assert sorted(str(path) for path in two.folder.rglob("*")) == before


def test_no_checkpoint_at_all_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").newest() is None


def test_tensors_that_do_not_fit_are_named(two):
    found = two.newest()
    with pytest.raises(CheckpointError, match="lacks 1 tensors: c"):
        read(found.path / WEIGHTS, {"a": torch.zeros(3), "b": torch.zeros(4), "c": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="has unknown 1 tensors: b"):
        read(found.path / WEIGHTS, {"a": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"a is torch.float32 \[3\], not torch.float32 \[5\]"):
        read(found.path / WEIGHTS, {"a": torch.zeros(5), "b": torch.zeros(4)})


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, None, [5]), (2, None, [5, 4]), (2, 1, [5, 4, 1]), (9, 2, [5, 4, 3, 2, 1])]
)
def test_the_newest_and_the_best_stay(tmp_path, keep, best, left):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(1, 6):
        save(checkpoints, step)
    checkpoints.prune(best)
    assert checkpoints.steps() == left
    assert len(list(tmp_path.iterdir())) == len(left)


class Dead(BaseException):
    """The process ends here."""


OPERATIONS = ("rename", "replace", "fsync", "open", "rmdir", "unlink", "mkdir")


def die_at(monkeypatch, number: int) -> list[int]:
    """Makes the n-th file operation of this process its last; answers the counter."""
    count = [0]

    def counted(inner):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] >= number:
                raise Dead  # and all later ones, too: the dead clean up nothing
            return inner(*args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return count


@pytest.mark.parametrize("again", [False, True])
def test_a_process_that_dies_at_any_file_operation_leaves_a_complete_checkpoint(tmp_path, again):
    """Kills: writing in place, removing the old one first or in place, an unfinished folder with a final name.

    With `again` the step that is being saved has been saved before.
    """
    died = 0
    for number in range(1, 200):
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        save(checkpoints, 1)
        if again:
            save(checkpoints, 2)
            checkpoints.prune()
        finished = True
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, number)
            try:
                save(checkpoints, 2)
                checkpoints.prune()
            except Dead:
                finished = False
        checkpoints.sweep()
        for step in checkpoints.steps():
            checkpoints.load(step)  # what has the name of a checkpoint is one
        found = checkpoints.newest()
        assert found is not None
        assert found.state.step in ((2,) if again or finished else (1, 2))
        if finished:
            break
        died += 1
    assert finished
    assert died > 10
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_ends_the_run_and_keeps_the_previous_checkpoint(tmp_path, monkeypatch, code):
    """Kills: announcing a checkpoint that was never flushed."""
    syncs = [0]
    plain = os.fsync

    def failing(handle):
        syncs[0] += 1
        if (tmp_path / "checkpoints/step-000004").exists() and os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        plain(handle)

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(ResourceError) as caught:
        run(tmp_path, settings(keep=1))
    assert caught.value.exit_code == 5
    monkeypatch.setattr(files.os, "fsync", plain)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    assert run(tmp_path, settings(keep=1), resume=True).resumed_step == 4


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_is_full_ends_the_run_and_leaves_no_draft(tmp_path, monkeypatch, call):
    """When room is taken, or behind the training. Kills: an error that the thread keeps to itself."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match="the disk is full"):
        run(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("copied", [True, False])
def test_training_goes_on_while_a_checkpoint_is_written_unless_its_copy_were_too_large(tmp_path, monkeypatch, copied):
    """Kills: a step that waits for the disk; writing what the next step has changed; a large state twice in memory."""
    run(tmp_path / "plain", settings(keep=9))
    plain, go, in_time = os.pwrite, threading.Event(), []

    def slow(*args):
        # the records of steps are written, too, and by the thread that makes the steps
        if copied and threading.current_thread() is not threading.main_thread():
            in_time.append(go.wait(20.0))
            go.set()
        return plain(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    if not copied:
        monkeypatch.setattr(keeper, "COPIED_BYTES", 0)
    seen = []

    def observe(record):
        seen.append((record["step"], (tmp_path / "slow/checkpoints/step-000004").exists()))
        if record["step"] == 7:
            go.set()

    run(tmp_path / "slow", settings(keep=9), observers=[observe])
    assert dict(seen)[6] is not copied
    assert all(in_time), "a step that waits for the disk never comes to the one that lets it go on"
    for file in (WEIGHTS, MOMENTS, STATE):
        mine, theirs = (tmp_path / name / "checkpoints/step-000004" / file for name in ("slow", "plain"))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_checkpoint_holds_weights_moments_state_and_no_pickle(tmp_path):
    tuned = TinyTuned()
    run(tmp_path, tuned=tuned)
    folder = tmp_path / "checkpoints/step-000012"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert set(load_file(folder / WEIGHTS)) == set(tuned.parameters)
    assert set(load_file(folder / MOMENTS)) == {f"{k}/{n}" for n in tuned.parameters for k in ("first", "second")}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {WEIGHTS, MOMENTS, STATE}
    assert {"torch_version", "threads", "kernels"} < set(manifest)
