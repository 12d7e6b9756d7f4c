"""What a file holds, judged by its first bytes, so that a wrong name gives a clear message and not a strange one.

`sources` asks before it reads; nothing here reads rows.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import stat
import tempfile
import zlib
from pathlib import Path
from typing import IO

from tunesmith.core.errors import DataError
from tunesmith.core.files import os_error, strict_loads

HEAD_BYTES = 65_536
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"PAR1": "parquet", b"ARROW1": "arrow", b"%PDF": "pdf", b"SQLite format": "sqlite", b"GGUF": "gguf",
    b"\x89PNG": "image", b"\x80\x04": "pickle",
}  # fmt: skip
_PACKED = ("gzip", "bzip2", "xz")
_UNPACK = {"zstd": "zstd -d", "zip": "unzip"}


def open_regular(path: Path, name: str) -> IO[bytes]:
    """Opens a regular file for reading; refuses folders, pipes and devices without waiting on them.

    What gzip, bzip2 or xz packed is unpacked into a temporary file first. Raises DataError, ResourceError.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            hint = f"name the files in it, as in {name.rstrip('/')}/*.jsonl"
            raise DataError("this is a folder, not a file", where=name, hint=hint)
        if not stat.S_ISREG(mode):
            raise DataError("this is a pipe or a device, not a file", where=name, hint="write it to a file first")
        stream = path.open("rb")
    except DataError:
        raise
    except OSError as error:
        raise os_error(name, error) from error
    kind = _magic(stream.read(16))
    stream.seek(0)
    return _unpacked(stream, kind, name) if kind in _PACKED else stream


def content_kind(stream: IO[bytes], name: str) -> str:
    """What a file holds: json, jsonl, text, html, empty, utf16, or the name of a binary kind.

    `text` is anything that is not JSON. The stream is left at its beginning. Raises DataError for UTF-16.
    """
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    whole = not stream.read(1)
    stream.seek(0)
    if kind := _magic(head):
        return kind
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in (head[:1], head[1:2]):
        hint = f"convert it: iconv -f UTF-16 -t UTF-8 {name} > converted"
        raise DataError("this looks like UTF-16; data files are UTF-8", where=name, hint=hint)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return "empty" if whole else "text"
    if text[:200].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "html"
    return _json_kind(text, whole)


def _json_kind(text: bytes, whole: bool) -> str:
    first, _, rest = text.replace(b"\r", b"\n").partition(b"\n")
    parsed = _parses(first)
    if text[:1] == b"[":
        # a list on the first line and more below is a (wrong) row, not a file that is one list
        return "jsonl" if parsed and (rest.strip() or not whole) else "json"
    if text[:1] == b"{":
        return "jsonl" if parsed or not (whole and _parses(text)) else "object"
    later = [line.lstrip()[:1] for line in rest.split(b"\n")[:20] if line.strip()]
    return "jsonl" if parsed or (later and later.count(b"{") > len(later) / 2) else "text"


def _parses(raw: bytes) -> bool:
    try:
        strict_loads(raw.decode("utf-8", "replace"))
    except ValueError:
        return False
    return True


def complain(kind: str, name: str, wanted: str) -> DataError:
    """The error for a file that does not hold what its name says."""
    holds = {"object": "one JSON object", "text": "plain text or CSV", "empty": "nothing", "html": "a web page (HTML)"}
    if kind in _UNPACK:
        hint = f"unpack it: {_UNPACK[kind]} {name}"
        return DataError(f"packed with {kind}, which is not read", where=name, hint=hint)
    hints = {
        "parquet": "give the file a name that ends in .parquet",
        "arrow": "give the file a name that ends in .arrow",
        "text": "give CSV a name that ends in .csv, text one that ends in .txt",
        "object": "write a list of rows, or one row a line",
        "html": "download the file itself, not the page that shows it",
        "jsonl": "give the file a name that ends in .jsonl",
        "json": "give the file a name that ends in .json",
    }
    what = holds.get(kind, {"json": "a JSON list", "jsonl": "JSON lines"}.get(kind, kind))
    return DataError(f"not {wanted}: the file holds {what}", where=name, hint=hints.get(kind, ""))


def _magic(head: bytes) -> str | None:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def _opened(stream: IO[bytes], kind: str | None) -> IO[bytes]:
    if kind == "gzip":
        return gzip.open(stream, "rb")  # type: ignore[return-value]
    return bz2.open(stream, "rb") if kind == "bzip2" else lzma.open(stream, "rb")  # type: ignore[return-value]


def _unpacked(stream: IO[bytes], kind: str | None, name: str) -> IO[bytes]:
    whole = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the source that reads it
    try:
        with stream, _opened(stream, kind) as packed:
            shutil.copyfileobj(packed, whole, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        whole.close()
        raise DataError(f"the {kind} stream is damaged or cut off: {error}", where=name) from error
    except OSError as error:
        whole.close()
        if error.errno is None:  # bz2 reports bad data so
            raise DataError(f"the {kind} stream is damaged: {error}", where=name) from error
        raise os_error(name, error) from error
    whole.seek(0)
    return whole
