"""The command that makes artefacts other programs load."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Target(StrEnum):
    """What `export --to` takes."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"


class Codes(StrEnum):
    """What `export --requantize` takes."""

    int8 = "int8"
    nf4 = "nf4"


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command()(export)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder that `tunesmith tune` wrote.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to write; must not exist yet.")],
    to: Annotated[Target, typer.Option("--to", help="What to write.")] = Target.merged,
    requantize: Annotated[
        Codes | None, typer.Option("--requantize", help="Round merged maps to codes again, and print the error.")
    ] = None,
) -> None:
    """Write what other tools load: the adapter for peft, a merged model for transformers, or a GGUF file."""
    from tunesmith.run.shipping import ship

    written = ship(run, to.value, folder, requantize.value if requantize else None)
    typer.echo(str(written))
