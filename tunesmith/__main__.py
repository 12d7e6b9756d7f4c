"""The program's first lines: `tunesmith` and `python -m tunesmith`.

What a signal does is settled before the rest is imported, which takes a tenth of a second.
"""

from __future__ import annotations

import sys

from tunesmith.core.signals import INTERRUPTED, leave_when_terminated


def main() -> None:
    """Runs the program; `tunesmith.cli.main` has the rest."""
    commands = [word for word in sys.argv[1:] if not word.startswith("-")]
    if commands[:1] == ["tune"]:
        leave_when_terminated()
    try:
        from tunesmith.cli.main import main as program
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    program()


if __name__ == "__main__":
    main()
