"""A plan is what others read: calibrated once, in proportion to its work, worded for people, made without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from plan_models import loss_of, small_config, small_model, with_low_rank
from rich.console import Console

from tunesmith.core.amounts import in_bytes, in_count, in_time
from tunesmith.plan.calibration import Calibration, calibrate
from tunesmith.plan.plan import Workload, make_plan
from tunesmith.plan.shape import read_shape
from tunesmith.plan.show import bar, show_plan


def test_a_calibration_is_measured_once_and_then_read(tmp_path):
    shape = read_shape(small_config("llama").to_dict())
    first = calibrate(shape, 64, seconds=0.005, folder=tmp_path)
    assert calibrate(shape, 64, seconds=0.005, folder=tmp_path) == first
    assert min(first.flops_per_second, first.bytes_per_second, first.operation_seconds) > 0


DAMAGES = ["12", '"fast"', "[1, 2, 3]", "{}", '{"flops_per_second": 1}', '{"flops_per_second": "1", "x": 2}', "null"]
WRONG = '{"flops_per_second": %s, "bytes_per_second": 1e9, "operation_seconds": 1e-6}'


@pytest.mark.parametrize("entry", [*DAMAGES, *(WRONG % value for value in ('"1e9"', "true", "null", "0", "-1"))])
def test_a_damaged_calibration_is_measured_again(tmp_path, entry):
    """Kills: trusting what a file holds because its key is right."""
    shape = read_shape(small_config("llama").to_dict())
    first = calibrate(shape, 64, seconds=0.005, folder=tmp_path)
    file = tmp_path / "calibration.json"
    (key,) = json.loads(file.read_text())
    file.write_text(f"{{{json.dumps(key)}: {entry}}}")
    again = calibrate(shape, 64, seconds=0.005, folder=tmp_path)
    assert min(again.flops_per_second, again.bytes_per_second, again.operation_seconds) > 0
    assert set(json.loads(file.read_text())[key]) == set(vars(first))


@pytest.mark.parametrize("content", [b'{"half": ', b"[]", b"\xff\xfe", b""])
def test_a_calibration_file_that_cannot_be_read_is_written_anew(tmp_path, content):
    (tmp_path / "calibration.json").write_bytes(content)
    shape = read_shape(small_config("llama").to_dict())
    found = calibrate(shape, 64, seconds=0.005, folder=tmp_path)
    assert calibrate(shape, 64, seconds=0.005, folder=tmp_path) == found


def test_a_cache_that_cannot_be_written_stops_no_run(tmp_path, caplog):
    """Kills: a run that needs a place for what only saves it a second."""
    (tmp_path / "file").write_text("")
    shape = read_shape(small_config("llama").to_dict())
    assert calibrate(shape, 64, seconds=0.005, folder=tmp_path / "file" / "cache").flops_per_second > 0
    assert caplog.text.count("the speed of this machine is not kept") == len(caplog.records) == 1


WORK = Workload(steps=10, tokens=1280, lengths=(128,), supervised_share=0.5)
FAST = Calibration(flops_per_second=1e9, bytes_per_second=1e9, operation_seconds=0.0)


def test_a_plan_has_the_keys_that_others_read():
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    plan = make_plan(model, shape, WORK, loss=loss_of(model), calibration=FAST).as_dict()
    assert {"parameters", "memory", "steps", "tokens", "flops", "seconds"} <= set(plan)
    assert set(plan["parameters"]) == {"total", "trainable"}
    assert (plan["steps"], plan["tokens"]) == (10, 1280)
    assert plan["seconds"] > plan["flops"] / 1e9
    json.dumps(plan, allow_nan=False)


@pytest.mark.parametrize("low_rank", [False, True])
def test_the_estimate_agrees_with_the_trace_where_both_exist(low_rank: bool):
    model = small_model("llama", device="meta", num_hidden_layers=8)
    if low_rank:
        with_low_rank(model)
    shape = read_shape(small_config("llama", num_hidden_layers=8).to_dict())
    traced = make_plan(model, shape, WORK, loss=loss_of(model))
    estimated = make_plan(model, shape, WORK)
    assert traced.parameters == estimated.parameters
    assert estimated.flops == pytest.approx(traced.flops, rel=0.1)
    assert estimated.memory.activations_bytes == pytest.approx(traced.memory.activations_bytes, rel=0.5)
    assert (estimated.as_dict()["activations"], traced.as_dict()["activations"]) == ("estimated", "traced")


def test_twice_the_tokens_are_twice_the_work_and_no_more_memory():
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    once = make_plan(model, shape, WORK, loss=loss_of(model))
    twice = make_plan(model, shape, Workload(20, 2560, (128,), 0.5), loss=loss_of(model))
    assert twice.flops == 2 * once.flops
    assert twice.memory == once.memory


def test_a_plan_reads_well_in_a_narrow_terminal():
    model = small_model("llama", device="meta")
    shape = read_shape(small_config("llama").to_dict())
    console = Console(width=70, record=True, file=io.StringIO())
    console.print(show_plan(make_plan(model, shape, WORK, loss=loss_of(model), calibration=FAST).as_dict()))
    text = console.export_text()
    assert "100 %" in text
    assert "activations" in text
    assert "10 steps, 1,280 tokens" in text
    assert max(map(len, text.splitlines())) <= 70


def test_amounts_are_written_for_people_in_powers_of_ten():
    assert [in_bytes(n) for n in (0, 999, 12_300, 731e6, 48e9, 1.2e12)] == [
        "0 bytes",
        "999 bytes",
        "12.3 kB",
        "731 MB",
        "48.0 GB",
        "1.2 TB",
    ]
    assert in_bytes(999_960) == "1.0 MB"
    assert in_count(134_500_000) == "134 M"
    assert [in_time(s) for s in (0.2, 48, 250, 11_520, 180_000)] == [
        "1 s",
        "48 s",
        "4 min 10 s",
        "3 h 12 min",
        "2 d 2 h",
    ]


def test_a_bar_is_as_long_as_its_value_and_never_vanishes():
    assert bar(10, 10, 8) == "█" * 8
    assert bar(5, 10, 8) == "█" * 4
    assert bar(1, 10_000, 8) == "▏"
    assert bar(0, 10, 8) == ""


def test_shapes_and_counting_import_no_torch():
    code = "import sys, tunesmith.plan.plan, tunesmith.plan.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
