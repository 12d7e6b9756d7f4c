"""The command that trains."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.arguments import ConfigFile, Overrides


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command(name="tune")(tune)


def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint of this run.")
    ] = False,
) -> None:
    """Train: adapt the model as CONFIG says, judge it before and after, write the run folder and its report.

    A list of stages is run in its order.
    """
    from tunesmith.config import naming
    from tunesmith.parallel.launch import Launch, started
    from tunesmith.run import run
    from tunesmith.run.staged import run_stages
    from tunesmith.run.stages import load_stages

    stages = load_stages(config, overrides)
    if stages.is_list:
        run_stages(stages, resume=resume)
        return
    wanted = stages.only
    words = ["tune", config, *(overrides or []), *(["--resume"] if resume else [])]
    with naming(config):
        started(wanted.layout, Launch(wanted.layout, words).line())
        run(wanted, resume=resume)
