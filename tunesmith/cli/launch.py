"""The command that starts a layout of several processes, through torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from tunesmith.parallel.layout import LayoutSection


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command(name="launch")(launch)


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run.")] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="How many, for layout: auto; without, one for each GPU.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines to spread the processes over.")] = 1,
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="HOST or HOST:PORT where those of several machines meet.")
    ] = "",
    restarts: Annotated[int, typer.Option("--restarts", min=0, help="Times to go on by itself after a failure.")] = 0,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print a batch script for Slurm instead.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Run it here instead of printing it.")] = False,
) -> None:
    """Print the torchrun line that tunes CONFIG with the processes of its layout."""
    from tunesmith.config import load_config
    from tunesmith.core.errors import ConfigError
    from tunesmith.parallel.launch import Launch

    layout = _counted(load_config(config, overrides).layout, processes)
    if layout.processes == 1:
        raise ConfigError("the layout is of one process", where="layout", hint=f"tunesmith tune {config}")
    words = ["tune", config, *(overrides or []), *(["--resume"] if resume else [])]
    line = Launch(layout, words, nodes, endpoint, restarts)
    if run:
        raise typer.Exit(_run(line.arguments()))
    typer.echo(line.slurm() if slurm else line.line(), nl=not slurm)


def _counted(layout: LayoutSection, processes: int | None) -> LayoutSection:
    """A layout with the number of processes of a run, which chooses what they do where it says auto."""
    from tunesmith.core.errors import ConfigError
    from tunesmith.parallel.layout import AutoLayout, LayoutSection

    if not isinstance(layout, AutoLayout):
        if processes is not None:
            told = f"{processes} has no effect on a layout that says how many processes it has"
            raise ConfigError(told, where="--processes", hint="layout=auto chooses one for so many")
        return layout
    if processes is None:
        import torch

        processes = torch.cuda.device_count()
    if not processes:
        raise ConfigError("auto does not say how many processes", where="layout", hint="--processes 2")
    return LayoutSection(data=processes)


def _run(arguments: list[str]) -> int:
    """Runs torchrun here and gives the exit code of the process that failed first; 8 where that was killed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from tunesmith.core.errors import PeerError
    from tunesmith.core.signals import INTERRUPTED, TERMINATED

    try:
        run(parse_args(arguments))
    except SignalException as error:
        return INTERRUPTED if error.sigval.name == "SIGINT" else TERMINATED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        # the others may have been too young to know it
        told = PeerError.told(f"rank {rank}: killed by {failure.signal_name()}")
        typer.echo(f"error: {told}\nhint: {PeerError.HINT}", err=True)
        return PeerError.exit_code
    return 0
