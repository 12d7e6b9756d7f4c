"""Regexes that a user wrote, run where they can do no harm.

A target that is no plain dotted name is a regex. Python's engine cannot be interrupted from within, and a dozen
characters can keep it busy for years, so a child process with a time limit does the matching.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from tunesmith.core.errors import ConfigError

LIMIT_CHARACTERS = 1000
LIMIT_SECONDS = 10.0
_PLAIN = re.compile(r"[\w.-]+")
_PROGRAM = (
    "import json,re,sys;p,names=json.load(sys.stdin);r=re.compile(p);"
    "json.dump([n for n in names if r.fullmatch(n)],sys.stdout)"
)


def is_regex(target: str) -> bool:
    """Whether a target is a pattern rather than a role or the end of a module name."""
    return _PLAIN.fullmatch(target) is None


def matching(pattern: str, names: Sequence[str], where: str) -> list[str]:
    """The names that a regex matches from end to end, in their order.

    Raises:
        ConfigError: it does not compile, is too long, or takes too long.
    """
    if len(pattern) > LIMIT_CHARACTERS:
        raise ConfigError(f"a target of {len(pattern)} characters; {LIMIT_CHARACTERS} are allowed", where=where)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{pattern!r} is not a regex: {error}", where=where) from error
    if not names:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([pattern, list(names)]),
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"the regex {pattern!r} takes more than {LIMIT_SECONDS:.0f} s to match",
            where=where,
            hint="avoid repetitions inside repetitions, as in (a+)+",
        ) from error
    return list(json.loads(done.stdout))
