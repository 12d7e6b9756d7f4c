"""Rows as tokens, kept on disk from run to run under a name that is the hash of all that decides them.

The one idea: a file is right or it is not there. Its name holds rows, template, tokenizer, settings and the code that
encodes; it appears whole; a damaged one is removed. Without a folder that can be written a run just encodes again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunesmith.core.files import cache_folder, canonical_json, os_error, sync_folder
from tunesmith.data.token_file import TokenFile, Tokens, TokenWriter

LIMIT_BYTES = 5_000_000_000  # of all files together; those that were not used for longest go first
FEW_ROWS = 300  # these are encoded sooner than pyarrow is imported
_ABANDONED_SECONDS = 86_400  # a file that is still unfinished then belongs to a process that died
log = logging.getLogger(__name__)


def key_of(facts: dict[str, Any]) -> str:
    """The name of what these facts and the code of this version make, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json({**facts, "code": code_hash()}).encode()).hexdigest()


@cache
def code_hash() -> str:
    """SHA-256 of everything that turns a file into tokens: the modules of `data`, what they use, and the libraries."""
    here = Path(__file__).parent
    core = [here.parent / "core" / name for name in ("files.py", "problem.py")]
    found = hashlib.sha256(repr([sys.version_info[:2], version("tokenizers"), version("jinja2")]).encode())
    for path in sorted([*here.glob("*.py"), *here.glob("*.jinja"), *core]):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)} ".encode() + content)
    return found.hexdigest()


def folder() -> Path:
    """Where the files lie."""
    return cache_folder() / "tokens"


def open_tokens(key: str, rows: int) -> TokenFile | None:
    """The file of a key, where there is a good one. A damaged one is removed, which is told."""
    path = folder() / f"{key}.arrow"
    try:
        found = TokenFile(path)
        if len(found) != rows:
            raise ValueError(f"it holds {len(found)} rows of {rows}")
    except OSError:  # it is made again, and what is wrong with the place is told then
        return None
    except ValueError as error:
        log.warning("%s: damaged (%s); it is made again", path, error)
        with suppress(OSError):
            path.unlink()
        return None
    with suppress(OSError):
        os.utime(path)
    return found


class Keeper:
    """Takes the rows of a file that is being made; where it cannot be, it says so once and takes no more.

    Attributes:
        path: the place of the finished file.
        made: the finished file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: TokenFile | None = None
        self._beside: Path | None = None
        self._writer: TokenWriter | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
            os.close(handle)
            self._beside = Path(name)
            self._writer = TokenWriter(self._beside)
        except OSError as error:
            self._give_up(error)

    def add(self, row_hash: int | None, tokens: Tokens) -> None:
        """The next row."""
        if self._writer is None:
            return
        try:
            self._writer.add(row_hash, tokens)
            full = self._writer.written_bytes > LIMIT_BYTES
        except OSError as error:
            self._give_up(error)
            return
        if full:
            log.warning("rows as tokens are not kept: they are more than %.1f GB", LIMIT_BYTES / 1e9)
            self.discard()

    def publish(self) -> None:
        """Puts the finished file in its place, and makes room for it."""
        if self._writer is None:
            return
        try:
            self._writer.finish()
            os.replace(self._writer.path, self.path)
            self._writer = self._beside = None
            sync_folder(self.path.parent)
            make_room(self.path)
            self.made = TokenFile(self.path)
        except OSError as error:
            self._give_up(error)

    def discard(self) -> None:
        """Leaves nothing of an unfinished file."""
        with suppress(OSError):
            if self._writer is not None:
                self._writer.abandon()
        with suppress(OSError):
            if self._beside is not None:
                self._beside.unlink()
        self._writer = self._beside = None

    def _give_up(self, error: OSError) -> None:
        self.discard()
        _tell(self.path.parent, error)


@contextmanager
def keeping(key: str) -> Iterator[Keeper]:
    """A place for rows that becomes the file of the key when the block ends well."""
    keeper = Keeper(folder() / f"{key}.arrow")
    try:
        yield keeper
        keeper.publish()
    finally:
        keeper.discard()


def make_room(newest: Path) -> None:
    """Removes what dead processes left, and the files that were not used for longest while all are over the limit."""
    listed = []
    for path in newest.parent.iterdir():
        with suppress(FileNotFoundError):  # another process makes room, too
            facts = path.stat()
            listed.append((facts.st_mtime, path, facts.st_size))
    total = sum(size for _, _, size in listed)
    for used, path, size in sorted(listed):
        is_left = path.suffix == ".tmp" and used < time.time() - _ABANDONED_SECONDS
        if path != newest and (is_left or (total > LIMIT_BYTES and path.suffix != ".tmp")):
            path.unlink(missing_ok=True)
            total -= size


def _tell(where: Path, error: OSError) -> None:
    log.warning("rows as tokens are not kept: %s: %s", where, os_error(where, error).message)
