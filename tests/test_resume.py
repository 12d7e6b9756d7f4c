"""A run that was broken anywhere and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_training import TinyTuned, evaluation, lasting, rows, run, settings, stream

from tunesmith.core import switches
from tunesmith.core.errors import CheckpointError, Stopped
from tunesmith.data.pack import Cursor
from tunesmith.kernels import build
from tunesmith.train import checkpoint
from tunesmith.train.section import PrecisionSection, StopSection

SCRIPT = Path(__file__).with_name("tiny_training.py")
SECTION = settings(steps=20, save_every=3, keep=2, micro_batch_rows=2)


def one_run(folder, *, resume=False, delay=0.0, section=SECTION, dtype=torch.float32, **rest):
    tuned = TinyTuned(dtype=dtype, dropout=0.2)
    precision = PrecisionSection(compute="bf16" if dtype == torch.bfloat16 else "fp32")
    result = run(
        folder, section, tuned=tuned, precision=precision, evaluate=evaluation(tuned), evaluate_every=4,
        resume=resume, delay_seconds=delay, **rest,
    )  # fmt: skip
    return result, {name: value.detach().clone() for name, value in tuned.parameters.items()}


def in_child(work) -> int:
    """Runs `work` in a forked process and answers its pid; the child never returns."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_at_call(number: int) -> None:
    """From here on, the n-th file operation of this process is preceded by SIGKILL."""
    count = [0]

    def counted(inner):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        return call

    for name in ("rename", "fsync", "pwrite", "open", "ftruncate", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return one_run(folder), lasting(folder)


def assert_same(folder, outcome, unbroken):
    (result, weights), bytes_ = unbroken
    assert (outcome[0].step, outcome[0].reason) == (result.step, result.reason)
    assert all(torch.equal(weights[name], value) for name, value in outcome[1].items())
    assert lasting(folder) == bytes_


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 25))])
def test_killed_at_a_random_file_operation_and_resumed_it_is_the_same_run(tmp_path, unbroken, seed):
    """Kills: random state that is not a function of the step, a cursor that is saved before its step, records
    that are written twice or not cut, moments that are lost."""
    draw = random.Random(seed)
    for attempt in range(draw.randint(1, 3)):
        number = draw.randint(1, 150)

        def work(number=number, attempt=attempt):
            kill_at_call(number)
            one_run(tmp_path, resume=attempt > 0)

        os.waitpid(in_child(work), 0)
    assert_same(tmp_path, one_run(tmp_path, resume=True), unbroken)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_killed_at_a_random_time_and_resumed_it_is_the_same_run(tmp_path, unbroken, seed):
    pid = in_child(lambda: one_run(tmp_path, delay=0.01))
    time.sleep(random.Random(seed).uniform(0.05, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert_same(tmp_path, one_run(tmp_path, resume=True), unbroken)


@pytest.mark.slow
def test_a_new_process_with_other_surroundings_continues_the_same_run(tmp_path):
    """Kills: dependence on the process: hash seed, working folder, locale, threads."""
    start = [sys.executable, str(SCRIPT)]
    plain = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([*start, str(tmp_path / "whole")], check=True, env=plain)
    child = subprocess.Popen([*start, str(tmp_path / "broken")], env={**plain, "STEP_DELAY": "0.1"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "broken/checkpoints/step-000010").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.wait()
    other = {**plain, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    subprocess.run([*start, str(tmp_path / "broken"), "--resume"], check=True, env=other, cwd=tmp_path)
    assert lasting(tmp_path / "broken") == lasting(tmp_path / "whole")


@pytest.mark.parametrize("steps_before", [3, 5, 10])
def test_stopping_at_an_epoch_end_or_within_changes_nothing(tmp_path, steps_before):
    """Kills: a position that is restored with the first epoch's order. An epoch is 5 steps of 5 rows."""
    data = rows(25)
    whole = run(tmp_path / "whole", settings(steps=15, save_every=5), data=data)
    first = settings(steps=15, save_every=steps_before)

    def stop(record):
        if record["step"] == steps_before:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as caught:
        run(tmp_path / "broken", first, data=data, observers=[stop])
    assert caught.value.exit_code == 75
    result = run(tmp_path / "broken", settings(steps=15, save_every=5), data=data, resume=True)
    assert (result.rows, result.resumed_step) == (whole.rows, steps_before)
    newest = "checkpoints/step-000015"
    for file in ("weights.safetensors", "moments.safetensors", "state.json"):
        assert (tmp_path / "whole" / newest / file).read_bytes() == (tmp_path / "broken" / newest / file).read_bytes()


def test_full_tuning_in_bf16_resumes_from_its_masters(tmp_path):
    """Kills: saving the rounded weights instead of the masters."""
    whole = one_run(tmp_path / "whole", dtype=torch.bfloat16)

    def work():
        kill_at_call(60)
        one_run(tmp_path / "broken", dtype=torch.bfloat16)

    os.waitpid(in_child(work), 0)
    assert_same(
        tmp_path / "broken",
        one_run(tmp_path / "broken", resume=True, dtype=torch.bfloat16),
        (whole, lasting(tmp_path / "whole")),
    )


def test_early_stop_and_best_survive_a_kill(tmp_path):
    """Kills: counters of the early stop that begin anew; a best checkpoint that is forgotten."""
    section = settings(steps=60, lr=0.3, save_every=7, stop=StopSection(metric="loss", patience=2))
    whole = one_run(tmp_path / "whole", section=section)
    assert whole[0].reason == "stop"
    assert whole[0].weights_step < whole[0].step
    for number in (40, 70, 90, 110):
        folder = tmp_path / str(number)

        def work(number=number, folder=folder):
            kill_at_call(number)
            one_run(folder, section=section)

        os.waitpid(in_child(work), 0)
        again = one_run(folder, section=section, resume=True)
        assert again[0].weights_step == whole[0].weights_step
        assert_same(folder, again, (whole, lasting(tmp_path / "whole")))


def test_a_flipped_byte_costs_steps_and_nothing_else(tmp_path, unbroken, caplog):
    with pytest.raises(Stopped):
        one_run(tmp_path, observers=[lambda r: r["step"] == 11 and signal.raise_signal(signal.SIGTERM)])
    newest = tmp_path / "checkpoints/step-000011/moments.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    outcome = one_run(tmp_path, resume=True)
    assert outcome[0].resumed_step == 9
    assert "step-000011/moments.safetensors" in caplog.text
    (tmp_path / "checkpoints/step-000011.damaged").rename(tmp_path / "aside")
    shutil.rmtree(tmp_path / "aside")
    assert_same(tmp_path, outcome, unbroken)


def test_with_only_damaged_checkpoints_nothing_is_run(tmp_path):
    run(tmp_path, settings(keep=9))
    for file in (tmp_path / "checkpoints").glob("*/state.json"):
        file.write_text("{}")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="step-000004"):
        run(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_without_a_checkpoint_it_starts_at_step_0_and_says_so(tmp_path, unbroken, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    assert_same(tmp_path, one_run(tmp_path, resume=True), unbroken)
    assert "starting at step 0" in caplog.text


def test_resuming_a_finished_run_changes_nothing(tmp_path, unbroken):
    one_run(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert_same(tmp_path, one_run(tmp_path, resume=True), unbroken)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == stamps


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(tmp_path, unbroken, number, code):
    """Kills: leaving in the middle of an update."""
    with pytest.raises(Stopped, match="step 8 is saved") as caught:
        one_run(tmp_path, observers=[lambda r: r["step"] == 8 and signal.raise_signal(number)])
    assert caught.value.exit_code == code
    assert_same(tmp_path, one_run(tmp_path, resume=True), unbroken)


def test_a_signal_during_an_evaluation_leaves_it_at_once_and_it_is_done_later(tmp_path, unbroken):
    """Kills: an evaluation that is lost, or done only at the next multiple; a record that is written twice."""

    def endless(step):
        if step < 8:
            return evaluation(tuned)(step)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            time.sleep(0.01)

    tuned = TinyTuned(dropout=0.2)
    with pytest.raises(Stopped):
        run(tmp_path, SECTION, tuned=tuned, evaluate=endless, evaluate_every=4)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 7
    # and once more, right behind the record that was missing
    with pytest.raises(ZeroDivisionError):
        one_run(tmp_path, resume=True, observers=[lambda record: 1 // 0])
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 8
    assert_same(tmp_path, one_run(tmp_path, resume=True), unbroken)


def test_two_interrupts_stop_at_once_without_saving(tmp_path):
    def twice(record):
        if record["step"] == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="twice") as caught:
        run(tmp_path, observers=[twice])
    assert caught.value.exit_code == 130
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_handlers_are_put_back_and_other_threads_can_train(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path / "main")
    assert signal.getsignal(signal.SIGTERM) is before
    worker = threading.Thread(target=run, args=(tmp_path / "thread",))
    worker.start()
    worker.join()
    assert lasting(tmp_path / "thread") == lasting(tmp_path / "main")


def test_the_threads_of_the_first_run_are_used_again(tmp_path, caplog):
    """Kills: sums that are split over another number of threads and differ in the last bit."""
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped):
        run(tmp_path, observers=[lambda r: r["step"] == 2 and signal.raise_signal(signal.SIGTERM)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        run(tmp_path, resume=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert f"using {threads} threads" in caplog.text


def test_another_torch_version_is_warned_about(tmp_path, monkeypatch, caplog):
    run(tmp_path)
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    run(tmp_path, resume=True)
    assert "this is 99.0.0" in caplog.text


def _warned(caplog):
    return [record.getMessage() for record in caplog.records if "last bits" in record.getMessage()]


@pytest.mark.parametrize("change", ["a switch", "no compiler", "none"])
def test_other_kernels_are_warned_about_in_one_line(change, tmp_path, monkeypatch, caplog):
    """Kills: a run that goes on with other bits and does not say so; a warning where nothing differs."""
    before = build.made_with()
    run(tmp_path)
    if change == "a switch":
        monkeypatch.setattr(switches, "from_environment", lambda: frozenset({"attention", "trim"}))
    elif change == "no compiler":
        monkeypatch.setattr(build, "library", lambda: None)
    caplog.clear()
    run(tmp_path, resume=True)
    after = {"a switch": f"{before} without attention, trim", "no compiler": "no compiled kernels", "none": before}
    told = f"the checkpoint was made with {before}, this is {after[change]}: results may differ in the last bits"
    assert _warned(caplog) == ([told] if after[change] != before else [])


def test_a_checkpoint_that_does_not_tell_its_kernels_is_resumed(tmp_path, caplog):
    """Kills: checkpoints of before the kernels were told that cannot be read any more."""
    run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["kernels"], manifest["seal"]
        path.write_text(checkpoint._sealed(manifest))
    run(tmp_path, resume=True)
    assert _warned(caplog) == []


def test_the_same_rows_are_seen_after_a_resume():
    """The stream of these tests is itself a function of the cursor."""
    whole = list(zip(stream(rows(), SECTION)(Cursor(0, 0)), range(12), strict=False))
    later = next(iter(stream(rows(), SECTION)(whole[6][0].cursor)))
    assert later.micro_batches == whole[7][0].micro_batches
