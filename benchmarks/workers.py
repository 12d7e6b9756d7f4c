"""Processes that train when they are told to, for benchmarks that let two libraries take turns.

The one idea: `turns.py` is a worker's end of a pair of pipes, this is the parent's. Nothing here imports torch, so that
the parent costs the workers neither memory nor threads.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "unsloth")


class EndedEarlyError(RuntimeError):
    """A worker that is no more, with the end of what it wrote to stderr."""


class Worker:
    """One side, in a process that works when it is told to.

    Args:
        script: a file of this folder; its arguments are `train` and the path of the settings.
        settings: `variant` and `threads` are read here, the rest by the script.
    """

    def __init__(self, script: str, settings: dict[str, Any], folder: Path) -> None:
        self.name = f"{script} {settings['variant']}"
        path = written(settings, folder)
        self.errors = path.with_suffix(".err")
        self.process = start([str(HERE / script), "train", str(path)], settings["threads"], self.errors)
        self.ready: dict[str, Any] = {}

    def wait(self) -> Worker:
        """Until it has loaded what it needs; what it then says of itself is `ready`."""
        self.ready = self.receive()
        return self

    def receive(self) -> dict[str, Any]:
        """The next document it sends."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EndedEarlyError(f"{self.name} ended early:\n" + self.errors.read_text()[-3000:])
        return dict(json.loads(line))

    def block(self, steps: int) -> dict[str, Any]:
        """Lets it do some steps."""
        self.go(steps)
        return self.receive()

    def go(self, steps: int) -> None:
        """Tells it to do some steps."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EndedEarlyError(f"{self.name} ended early:\n" + self.errors.read_text()[-3000:]) from None

    def close(self) -> None:
        """Waits for its end, or ends it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=60)
        except BrokenPipeError:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(arguments: list[str], threads: int, errors: Path) -> subprocess.Popen[str]:
    """A Python process with so many threads, its stderr in a file."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with errors.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=ROOT,
            env=environment,
        )


def written(settings: dict[str, Any], folder: Path) -> Path:
    """Settings in a file of their own."""
    handle, name = tempfile.mkstemp(dir=folder, suffix=".json")
    os.close(handle)
    Path(name).write_text(json.dumps(settings))
    return Path(name)


def prepared(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the steps and the factors that both sides start from; what `ours.py` says of them."""
    if settings["model"] == "tiny":
        settings["model"] = tiny(folder / "tiny")
    errors = folder / "prepare.err"
    if start([str(HERE / "ours.py"), "prepare", str(written(settings, folder))], settings["threads"], errors).wait():
        raise SystemExit("preparing failed:\n" + errors.read_text()[-3000:])
    return dict(json.loads((folder / "prepared.json").read_text()))


def tiny(folder: Path) -> str:
    """A random llama of a few thousand parameters with a tokenizer, in a folder."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer_folder

    tiny_tokenizer_folder(folder)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2, bos_token_id=None, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same model for those who go on with what others began
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def machine(threads: int) -> dict[str, Any]:
    """Where this ran."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    found = {"cpu": name, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0]}
    return found | {package: known for package in PACKAGES if (known := _version(package))}


def described(found: dict[str, Any]) -> str:
    """`machine` in a line."""
    rest = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    return f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread(s), load {found['load']:.1f}; {rest}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "count": len(values)}


def told(values: dict[str, float], digits: int = 2) -> str:
    """A spread for people."""
    middle, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def say(what: str) -> None:
    """To whoever is waiting."""
    print(what, file=sys.stderr, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
