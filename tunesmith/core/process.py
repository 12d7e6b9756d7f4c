"""Which of the processes of a run speaks: the first one alone shows progress and says what goes on."""

from __future__ import annotations

import os


def speaks() -> bool:
    """Whether this process is the first of its run, or the only one; torchrun says so in the environment."""
    return os.environ.get("RANK", "0") == "0"
