"""metrics.jsonl holds one record a step, survives what it can, and never stops a run."""

from __future__ import annotations

import json
import os
import sys

import pytest
from tiny_training import TinyTuned, collate, run, settings, stream

from tunesmith.core.errors import ResourceError
from tunesmith.data.pack import Cursor
from tunesmith.train.log import MetricsLog, TensorBoard, peak_bytes
from tunesmith.train.progress import told, training_progress
from tunesmith.train.schedule import learning_rate

FIELDS = {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second", "peak_bytes"}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_record_n_holds_the_loss_of_the_batch_of_update_n_before_it(tmp_path):
    """Kills: logging the loss after the update, or of the step before."""
    section = settings(steps=3, micro_batch_rows=5)
    expected = []
    tuned = TinyTuned()
    from tiny_training import rows

    steps = stream(rows(), section)(Cursor(0, 0))
    batches = [collate(next(steps).micro_batches[0]) for _ in range(3)]
    before = TinyTuned()
    expected.append(before.policy.token_losses(batches[0]).mean().item())
    run(tmp_path, section, tuned=tuned, observers=[
        lambda r: r["step"] < 3 and expected.append(tuned.policy.token_losses(batches[r["step"]]).mean().item())
    ])  # fmt: skip
    found = records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in found] == [1, 2, 3]
    assert all(set(record) >= FIELDS for record in found)
    assert [record["loss"] for record in found] == pytest.approx(expected, rel=1e-6)
    assert [record["lr"] for record in found] == [learning_rate(section, n, 3) for n in (1, 2, 3)]
    assert [record["tokens"] for record in found] == [batch.ids.numel() for batch in batches]
    assert [record["supervised_tokens"] for record in found] == [batch.targets.numel() for batch in batches]


def test_evaluations_stand_in_the_record_of_their_step(tmp_path):
    run(tmp_path, settings(steps=5), evaluate=lambda step: {"bleu": float(step)}, evaluate_every=2)
    found = {record["step"]: record.get("eval_bleu") for record in records(tmp_path / "metrics.jsonl")}
    assert found == {1: None, 2: 2.0, 3: None, 4: 4.0, 5: 5.0}


def test_two_runs_write_the_same_bytes(tmp_path):
    """Kills: fields that depend on the clock under another name."""
    for name in ("a", "b"):
        run(tmp_path / name)
    aside = ("_seconds", "_per_second", "_bytes")
    plain = [
        [
            {k: v for k, v in record.items() if not k.endswith(aside)}
            for record in records(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("a", "b")
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"\x00\xff\n", b'{"step": NaN}\n', b"[4]\n"])
def test_opening_keeps_the_records_up_to_a_step_and_cuts_the_rest(tmp_path, tail):
    """Kills: appending to a line that was torn; keeping records of steps that will be repeated."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    for keep, left in ((3, [1, 2, 3]), (2, [1, 2]), (0, [])):
        log = MetricsLog(path, keep)
        log.write({"step": keep + 1})
        log.close()
        assert [record["step"] for record in records(path)] == [*left, keep + 1]


def test_a_disk_that_is_full_for_the_log_costs_records_and_one_warning(tmp_path, monkeypatch, caplog):
    """Kills: a run that dies for its log; half a line that hides the next record."""
    plain, failed = os.pwrite, []

    def full(handle, data, at):
        if b'"step": 3,' in data or b'"step": 12,' in data:
            failed.append(plain(handle, data[:9], at))
            return 9
        if b'"step": 4,' in data:
            raise OSError(28, "No space left on device")
        return plain(handle, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    assert run(tmp_path).step == 12
    assert failed == [9, 9]
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2, *range(5, 12)]
    assert caplog.text.count("records are missing") == 1


def test_a_log_that_cannot_be_opened_is_an_error_with_its_name(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ResourceError, match=r"metrics\.jsonl"):
        MetricsLog(tmp_path / "metrics.jsonl")


def test_tensorboard_shows_each_number_and_hides_what_a_resumed_run_repeats(tmp_path):
    """Kills: a resumed run whose steps appear twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3, 4), (3, 4, 5)):
        board = TensorBoard(tmp_path)
        for step in steps:
            board({"step": step, "loss": 1.0 / step, "eval_bleu": 2.0, "note": "text"})
        board.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(shown.Tags()["scalars"]) == ["eval/bleu", "train/loss"]
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_the_peak_grows_with_what_was_allocated():
    before = peak_bytes()
    block = bytearray(b"x") * 60_000_000
    assert before > 10**7
    assert peak_bytes() >= before
    assert len(block) == 60_000_000


def test_without_a_terminal_the_display_is_a_plain_line_now_and_then(tmp_path, capsys):
    """Kills: control characters in a log file; a line for every step."""
    section = settings(steps=40)
    with training_progress(40) as observer:
        run(tmp_path, section, observers=[observer])
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("step 1/40 loss ")
    assert lines[-1].startswith("step 40/40 loss ")
    assert len(lines) < 10
    assert "\x1b" not in err


def test_in_a_terminal_the_display_is_a_bar_with_what_is_told(tmp_path, capsys, monkeypatch):
    """Kills: a bar that starts at 0 on a resumed run; numbers that never reach it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with training_progress(12) as observer:
        run(tmp_path, observers=[observer])
    err = capsys.readouterr().err
    assert "12/12" in err
    assert "loss " in err


def test_a_device_that_is_always_full_costs_the_log_and_nothing_else(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert run(tmp_path).step == 12
    assert caplog.text.count("No space left on device") == 1


def test_a_record_is_told_with_loss_speed_memory_and_what_was_evaluated():
    line = told(
        {"loss": 1.5, "tokens_per_second": 99.6, "peak_bytes": 2_500_000_000, "eval_bleu": 3.0, "eval_seconds": 1}
    )
    assert line == "loss 1.5000 100 tokens/s 2.50 GB bleu 3"
