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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.context import holding
from tunesmith.core.files import cache_folder
from tunesmith.core.switches import off

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
FOLDER = "TUNESMITH_KERNELS"  # names another folder for what is compiled
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had: no compiler, or an error of its."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        log.info("no C compiler: fused kernels are left out, training is slower (install gcc to have them)")
        return None
    try:
        return _opened(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        log.warning("the fused kernels did not compile, training is slower: %s", told.decode(errors="replace")[-300:])
        return None


def made_with() -> str:
    """What the last bits of results depend on here, to be compared and shown: the kernels, and what is switched off.

    Another compiler, processor, torch or version of the kernels makes other kernels.
    """
    held, switched_off = library(), off()
    kernels = "no compiled kernels" if held is None else f"kernels {Path(held._name).stem}"
    return kernels + (f" without {', '.join(switched_off)}" if switched_off else "")


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: dense CPU tensors in float32 or bfloat16 with data, or a plan's stand-ins."""
    dense = _stand_ins() if imitating() else _DENSE
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in dense or tensor.dtype not in DTYPES or tensor.device.type != "cpu"
        ):
            return False
    if library() is None or torch.compiler.is_compiling():
        return False
    return imitating() or torch._C._functorch.peek_interpreter_stack() is None


@cache
def _stand_ins() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor  # slow to import, and here already

    return (FakeTensor,)


_DENSE = (Tensor, torch.nn.Parameter)
_work: ContextVar[Callable[[int], None] | None] = ContextVar("tunesmith_work", default=None)
_expanded: ContextVar[Callable[[int], None] | None] = ContextVar("tunesmith_expanded", default=None)
_imitating: ContextVar[bool] = ContextVar("tunesmith_imitating", default=False)


@contextmanager
def imitated() -> Iterator[None]:
    """Lets kernels take tensors without data: they make their results and do nothing to them, for a plan."""
    with holding(_imitating, True):
        yield


def imitating() -> bool:
    """Whether kernels have nothing to do; see `imitated`."""
    return _imitating.get()


@contextmanager
def counted(add: Callable[[int], None], expand: Callable[[int], None]) -> Iterator[None]:
    """Tells `add` of the work of kernels within, in floating-point operations of products and attention, and `expand`
    of the numbers that are made of codes."""
    with holding(_work, add), holding(_expanded, expand):
        yield


def worked(flops: int) -> None:
    """Tells who counts that a kernel has done so much."""
    add = _work.get()
    if add is not None:
        add(flops)


def expanded(numbers: int) -> None:
    """Tells who counts that so many numbers were made of codes."""
    expand = _expanded.get()
    if expand is not None:
        expand(numbers)


class Functions:
    """C functions of the library, by name, each with what it takes: p a pointer, l a long, f a float, i an int.

    While a plan is made they do nothing and answer 0. What a function that answers nothing gives has no meaning.
    """

    def __init__(self, **taken: str) -> None:
        self._taken = taken
        self._declared: dict[str, Callable[..., int]] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        if imitating():
            return _nothing
        if not self._declared:
            self._declare()
        return self._declared[name]

    def _declare(self) -> None:
        held = library()
        assert held is not None  # `usable` was asked before
        kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}
        for name, letters in self._taken.items():
            getattr(held, name).argtypes = [kinds[letter] for letter in letters]
            getattr(held, name).restype = ctypes.c_int
            self._declared[name] = getattr(held, name)


def _nothing(*_: Any) -> int:
    return 0


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's data begins; None, which is null, for none."""
    return None if tensor is None or imitating() else tensor.data_ptr()


def threads() -> int:
    """How many threads a kernel may use."""
    return torch.get_num_threads()


def _opened(compiler: str) -> ctypes.CDLL:
    """The library; one that was damaged where it is kept is compiled again."""
    path = _built(compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(_built(compiler)))


def _built(compiler: str) -> Path:
    """The compiled library's path; compiled if it is not there."""
    sources = sorted(HERE.glob("*.c"))
    content = b"".join(path.read_bytes() for path in [*sources, *sorted(HERE.glob("*.h"))])
    key = [*FLAGS, compiler, platform.machine(), _processor(), torch.__version__, hashlib.sha256(content).hexdigest()]
    folder = Path(os.environ.get(FOLDER) or cache_folder() / "kernels")
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
