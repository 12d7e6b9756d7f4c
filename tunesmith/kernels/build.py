"""The C kernels as one library, compiled on first use for the processor at hand and kept in the cache.

On first use rather than at install, so that a package built elsewhere never holds instructions that this processor
lacks. Without a compiler everything runs through the plain twins; the log says so once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tunesmith.core.files import cache_folder

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had: no compiler, or an error of its."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        log.info("no C compiler: fused kernels are left out, training is slower (install gcc to have them)")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        log.warning("the fused kernels did not compile, training is slower: %s", told.decode(errors="replace")[-300:])
        return None


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: dense CPU tensors in float32 or bfloat16 that nobody traces."""
    if _get_current_dispatch_mode_stack() or torch.compiler.is_compiling():
        return False
    held = [tensor for tensor in tensors if tensor is not None]
    plain = all(type(t) in _DENSE and t.device.type == "cpu" and t.dtype in DTYPES for t in held)
    return plain and torch._C._functorch.peek_interpreter_stack() is None and library() is not None


_DENSE = (Tensor, torch.nn.Parameter)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's data begins; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def threads() -> int:
    """How many threads a kernel may use."""
    return torch.get_num_threads()


def _built(compiler: str) -> Path:
    """The compiled library's path; compiled if it is not there."""
    sources = sorted(HERE.glob("*.c"))
    content = b"".join(path.read_bytes() for path in [*sources, *sorted(HERE.glob("*.h"))])
    key = [*FLAGS, compiler, platform.machine(), _processor(), torch.__version__, hashlib.sha256(content).hexdigest()]
    folder = cache_folder() / "kernels"
    target = folder / f"{hashlib.sha256(' '.join(key).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log.info("compiling the fused kernels, once for this machine")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / target.name
            command = [compiler, *FLAGS, *map(str, sources), "-o", str(made), *_threads_library(), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            made.replace(target)
    return target


def _threads_library() -> list[str]:
    """torch's own copy of the OpenMP runtime: with a second one, two pools of threads would wait for each other."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [str(found[0])] if found else []


def _processor() -> str:
    """What this processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
