"""The command that derives published numbers."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tunesmith.cli.arguments import Json


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command(name="claims")(claims)


def claims(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which ones; all without any.")] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/claims.md.")] = False,
) -> None:
    """Derive the published numbers that follow from stated settings, and say which agree.

    Parameters are counted by the code that tunes models, on models without weights: nothing is fetched or trained.
    """
    from tunesmith.claims.ledger import as_markdown, as_table, derive

    found = derive(ids or ())
    if as_json:
        from tunesmith.cli.main import print_json

        print_json([one.as_dict() for one in found])
    elif markdown:
        typer.echo(as_markdown(found))
    else:
        from rich.console import Console

        from tunesmith.evaluate.table import table_width

        Console(highlight=False, width=table_width(sys.stdout)).print(as_table(found))
