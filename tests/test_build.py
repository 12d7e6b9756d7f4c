"""Kernels that cannot be compiled are left out and that is said; one that is damaged is made again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tunesmith.kernels import build
from tunesmith.kernels.elementwise import plain_rms_norm, rms_norm

pytestmark = pytest.mark.slow  # compiles
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture(autouse=True)
def _afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(build.FOLDER, str(tmp_path / "kernels"))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def the_plain_twin_runs() -> bool:
    x, weight = torch.randn(5, 8), torch.rand(8)
    assert not build.usable(x)
    return torch.equal(rms_norm(x, weight, 1e-6), plain_rms_norm(x, weight, 1e-6))


def test_without_a_compiler_the_plain_twins_run_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    caplog.set_level("INFO")
    assert the_plain_twin_runs()
    assert the_plain_twin_runs()
    assert [record.message for record in caplog.records if "no C compiler" in record.message] == caplog.messages


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert the_plain_twin_runs()
    assert "out of luck" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels").write_text("in the way")
    assert the_plain_twin_runs()
    assert str(tmp_path / "kernels") in caplog.text


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here to make a library with")
def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMPILER is not None
    kept = build._built(COMPILER)
    whole = kept.stat().st_size
    kept.write_bytes(kept.read_bytes()[:100])
    monkeypatch.setenv("CC", COMPILER)
    assert build.library() is not None
    assert kept.stat().st_size == whole
