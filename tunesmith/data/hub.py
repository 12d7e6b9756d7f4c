"""Rows of a data set on the Hugging Face hub, through `datasets`, which is imported when a hub id is asked for.

Without a network the hub's own cache is used and nothing is waited for. No code of a data set is run.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tunesmith.core.errors import DataError
from tunesmith.data.spool import Spooled, json_line

_HINT = "there is no such file; where the hub cannot be reached, download the rows and name the file"


def hub_rows(name: str) -> Iterator[Spooled]:
    """Rows of `owner/name`, `owner/name:split` or `owner/name:config:split`; the split is train when left out.

    Raises DataError when it is not to be had.
    """
    repository, *chosen = name.split(":")
    config = chosen[0] if len(chosen) == 2 else None
    split = chosen[-1] if chosen else "train"
    if not _resolves():
        # else the hub's client tries for half a minute; read when `datasets` is imported
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import datasets
    except ImportError as error:
        raise DataError("hub ids need the package `datasets`", where=name, hint="pip install datasets") from error
    try:
        found: Any = datasets.load_dataset(repository, config, split=split)
        yield from ((json_line(row), 0) for row in found)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"neither a file nor to be had from the hub: {reason}", where=name, hint=_HINT) from error


def _resolves() -> bool:
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname, 443)
    except OSError:
        return False
    return True
