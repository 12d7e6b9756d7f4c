"""One compute thread a test process, little to do for its garbage collector, and folders with runs.

Two test processes run side by side, and beside a busy core one thread is faster.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.core.files import cache_folder

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# many tests have a cache of their own: the kernels need not be compiled in each
os.environ.setdefault("TUNESMITH_KERNELS", str(cache_folder() / "kernels"))

gc.disable()  # while everything is imported, which is kept


def pytest_collection_finish() -> None:
    """What there is now stays to the end: looking through it again and again is a tenth of the tests' time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing is wrong: a model, rows, a configuration. To be copied, not changed."""
    from fault_cases import alpaca, config
    from tiny_folders import tiny_folder

    folder = tmp_path_factory.mktemp("good")
    tiny_folder(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(alpaca(24)) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(alpaca(4, 100)) + "\n")
    (folder / "c.yaml").write_text(config())
    return folder


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs of these folders keep between them, such as how fast the machine is."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(good: Path, run_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good folder with a finished run."""
    from fault_cases import run_here

    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("finished") / "work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(run_cache))
        patch.chdir(folder)
        assert run_here("tune c.yaml")["code"] == 0
    return folder


@pytest.fixture
def begin(tmp_path: Path, run_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Copies one of these folders and goes there."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(run_cache))

    def copy(source: Path) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "work"))
        monkeypatch.chdir(folder)
        return folder

    return copy
