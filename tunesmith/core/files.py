"""Files that are complete or absent: atomic writes, hashes, strict JSON, folder locks, the cache folder.

The one idea: write beside, flush to the disk, rename. What reads a path never meets half a file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunesmith.core.errors import BusyError, DataError, ResourceError, TunesmithError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission denied", "choose a folder that you may write, or change its permissions"),
    errno.EPERM: ("operation not permitted", "choose a folder that you may write"),
    errno.EMFILE: ("too many open files", "raise the limit with `ulimit -n 1024`"),
    errno.ENFILE: ("the system has too many open files", "close other programs"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one"),
    errno.EIO: ("the disk reported an error", "check the disk"),
}


def os_error(where: str | Path, error: OSError) -> ResourceError:
    """The same failure as a ResourceError that says what to do."""
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), ""))
    return ResourceError(reason, where=str(where), hint=hint)


def sha256_file(path: Path | str) -> str:
    """SHA-256 of the bytes of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any, indent: int | None = None) -> str:
    """JSON that depends on the value alone: sorted keys, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent)


def strict_loads(text: str) -> Any:
    """JSON without duplicate keys, NaN or infinity. Raises ValueError (RecursionError becomes one, too)."""
    try:
        return _STRICT.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# made once: data files have millions of rows
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def read_json(path: Path | str, kind: type[TunesmithError] = DataError) -> Any:
    """A JSON file, strictly; raises `kind` naming the file."""
    try:
        return strict_loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise kind("the file is missing", where=str(path)) from error
    except OSError as error:
        raise os_error(path, error) from error
    except ValueError as error:
        raise kind(f"not valid JSON: {error}", where=str(path)) from error


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Writes a file so that at any moment it is the old one or the new one, whole. Raises ResourceError."""
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:60]}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise os_error(path, error) from error


def sync_folder(path: Path | str) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Every file inside is flushed before the rename. An existing folder at `path` is replaced only at the end.
    Raises ResourceError.
    """
    path = Path(path)
    work = draft_folder(path)
    try:
        yield work
        publish_folder(work, path)
    except OSError as error:
        if isinstance(error, TunesmithError):
            raise
        raise os_error(path, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def draft_folder(path: Path) -> Path:
    """A temporary folder beside `path`, for `publish_folder`. Raises ResourceError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name[:60]}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise os_error(path, error) from error


def publish_folder(work: Path, path: Path) -> None:
    """Flushes everything in a folder and makes it `path`, in the place of what is there. Raises OSError."""
    for file in work.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    for folder in [work, *(found for found in work.rglob("*") if found.is_dir())]:
        sync_folder(folder)
    os.chmod(work, 0o755)
    old = work.with_suffix(".old")
    if path.exists():
        os.rename(path, old)
    os.rename(work, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def cache_folder() -> Path:
    """Where converted models and fetched data are kept: $TUNESMITH_CACHE, or the user's cache folder."""
    named = os.environ.get("TUNESMITH_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "tunesmith"


class FolderLock:
    """One process at a time in a folder; released by the kernel when the process dies.

    Raises BusyError naming the process that holds it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / ".lock"

    def __enter__(self) -> FolderLock:
        try:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise os_error(self.path, error) from error
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self.handle, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(self.handle)
            raise BusyError(
                f"in use by {holder}", where=str(self.path.parent), hint="wait for it, or choose another out:"
            ) from error
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.ftruncate(self.handle, 0)
        os.close(self.handle)
