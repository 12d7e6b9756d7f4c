"""The command line: `tunesmith COMMAND`. Here are the program, its errors and its exit codes; a file a command group.

Commands import what they need when they run, so that `--help` answers at once and never loads torch.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import typer

from tunesmith.cli import claims, compare, judge, launch, look, planning, ship, start, sweep, talk, tune
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import os_error

app = typer.Typer(
    name="tunesmith",
    help="Plan, adapt, judge and ship foundation models after pretraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug anywhere shows where an error comes from. Exit codes: 0 done, 2 configuration or usage, 3 data, "
    "4 model or checkpoint, 5 resource, 6 diverged, 7 busy, 8 another process of the run failed, "
    "75 and 130 stopped after saving.",
)
# typer brings its own copy of click, under a name that is not public
UsageError = typer.BadParameter.__mro__[1]

for group in (start, look, planning, tune, launch, judge, sweep, compare, claims, talk, ship):
    group.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program and exits with the code that fits what happened."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(app(args=words, standalone_mode=False, prog_name="tunesmith") or 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        sys.exit(_report(error, as_json="--json" in words))


def _report(error: BaseException, as_json: bool) -> int:
    """Prints one message and gives the exit code."""
    message, where, hint, code = _described(error)
    if isinstance(error, TunesmithError) and error.is_told:
        return code
    if as_json:
        print(json.dumps({"error": message, "where": where, "hint": hint, "exit_code": code}))
    line = f"{where}: {message}" if where else message
    for text in (f"error: {line}", f"hint: {hint}" if hint else ""):
        if text:
            print(_printable(text), file=sys.stderr)
    return code


def _described(error: BaseException) -> tuple[str, str, str, int]:
    if isinstance(error, TunesmithError):
        return error.message, error.where, error.hint, error.exit_code
    if isinstance(error, UsageError):
        context: Any = getattr(error, "ctx", None)
        hint = f"see `{context.command_path} --help`" if context else ""
        return error.format_message(), "", hint, 2  # type: ignore[attr-defined]
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted", "", "", 130
    if isinstance(error, BrokenPipeError):
        # the reader of our output went away (as in `| head`): nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "the reader of the output went away", "", "", 0
    if isinstance(error, OSError):
        problem = os_error(error.filename or "", error)
        return problem.message, problem.where, problem.hint, problem.exit_code
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return "out of memory", "", "lower train.micro_batch_tokens, or see `tunesmith plan`", 5
    kind = type(error).__name__
    return f"{kind}: {error}", "unexpected", "this is a bug in tunesmith; --debug shows where", 1


# as torch and its libraries say it, as RuntimeError
_NO_MEMORY = ("not enough memory", "out of memory", "can't allocate memory", "could not create a memory object")


def _printable(text: str) -> str:
    """The text with control characters escaped, so that a file's content cannot drive the terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1))
