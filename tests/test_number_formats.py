"""The table of `plan --formats` says what the formats are, by their definitions and not by what torch says."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.plan.formats import LARGEST, formats

# bits of exponent and fraction, and the largest number: IEEE 754, and Micikevicius et al. 2022, arXiv 2209.05433
LAYOUTS = {
    "fp32": (8, 23, None), "tf32": (8, 10, None), "bf16": (8, 7, None), "fp16": (5, 10, None), "fp8 e5m2": (5, 2, None),
    "fp8 e4m3": (4, 3, 448.0),
}  # fmt: skip
TABLE = {one.name: one for one in formats()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_floating_format_is_what_its_exponent_and_fraction_make_it(name):
    exponent, fraction, largest = LAYOUTS[name]
    found, bias = TABLE[name], 2 ** (exponent - 1) - 1
    assert found.bits == 1 + exponent + fraction
    assert found.largest == (largest or (2 - 2.0**-fraction) * 2.0**bias)
    assert found.smallest == 2.0 ** (1 - bias - fraction)
    assert found.epsilon == 2.0**-fraction
    step = 2 * 2.0**-fraction  # of numbers from 2 to 4
    assert found.pi == round(math.pi / step) * step


def test_codes_hold_pi_as_their_steps_and_scales_allow():
    assert TABLE["int8"].pi == pytest.approx(round(math.pi / LARGEST * 127) / 127 * LARGEST, rel=1e-6)
    assert TABLE["nf4"].pi == pytest.approx(0.7229568362236023 * LARGEST, rel=1e-3)
    assert TABLE["int8"].smallest == pytest.approx(1 / 127, rel=1e-5)


def test_bytes_are_those_of_the_qlora_paper():
    """Section 3: double quantisation takes the scales from 0.5 to 0.127 bits a parameter."""
    assert 8 * TABLE["nf4"].bytes_per_parameter == pytest.approx(4 + 0.127, abs=5e-4)


def test_the_command_prints_every_format_and_needs_no_configuration():
    told = CliRunner().invoke(app, ["plan", "--formats", "--json"])
    assert told.exit_code == 0
    assert [one["name"] for one in json.loads(told.stdout)] == list(TABLE)
    shown = CliRunner().invoke(app, ["plan", "--formats"]).stdout
    assert all(name in shown for name in TABLE)
