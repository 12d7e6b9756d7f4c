"""The command that says what a run needs before it is paid: plan, what would fit instead, and layouts on clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.arguments import Json, Overrides

if TYPE_CHECKING:
    from tunesmith.config import Config
    from tunesmith.plan.plan import Plan
    from tunesmith.run.prepare import Prepared
    from tunesmith.run.stages import Stages

Costs = tuple[float | None, float | None]  # watts, and the price of an hour


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command()(plan)


def plan(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="A YAML file, as `tunesmith init` writes it.")] = "",
    overrides: Overrides = None,
    fit: Annotated[
        str, typer.Option("--fit", metavar="SIZE", help="What to change so that the run fits into it, as in 24GB.")
    ] = "",
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="The largest micro-batch that fits into --fit, or what is free.")
    ] = False,
    max_length: Annotated[
        bool, typer.Option("--max-length", help="The longest row that fits into --fit, or what is free.")
    ] = False,
    max_model: Annotated[
        str, typer.Option("--max-model", metavar="SIZE", help="The largest model of CONFIG's family that fits into it.")
    ] = "",
    curve: Annotated[
        str,
        typer.Option("--curve", metavar="FOLDER", help="Short runs on 1 to 8 % of the data, in it: is more worth it?"),
    ] = "",
    watts: Annotated[
        float | None, typer.Option("--watts", min=0.1, help="What this machine takes, for the energy of the run.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", min=0.0, help="What an hour of it costs, for the run's price.")
    ] = None,
    html: Annotated[str, typer.Option("--html", metavar="FILE", help="Write the plan as a page, too.")] = "",
    history: Annotated[
        str, typer.Option("--history", metavar="FOLDER", help="How right the plans of the runs below a folder were.")
    ] = "",
    cluster: Annotated[
        str,
        typer.Option("--cluster", metavar="FILE", help="A YAML file of nodes, or 8xh100: ranks the layouts on them."),
    ] = "",
    top: Annotated[int, typer.Option("--top", min=1, help="How many layouts of a cluster to show.")] = 10,
    formats: Annotated[bool, typer.Option("--formats", help="Show the formats of numbers instead of a plan.")] = False,
    as_json: Json = False,
) -> None:
    """Say before anything is paid what CONFIG needs: parameters, memory, steps, tokens, FLOPs, time.

    With --fit: what to change so that it fits. With --cluster: how the model would lie on machines that are only
    described, every layout, the fastest first. With --history: predicted beside measured, over past runs.
    """
    if formats or not (config or history):
        _formats(bool(config), formats, as_json)
        return
    if history:
        _history(bool(config), history, as_json)
        return
    from tunesmith.config import naming
    from tunesmith.run.stages import load_stages

    stages = load_stages(config, overrides)
    if not (cluster or curve or max_model or max_batch or max_length or html):
        _plans(stages, fit, (watts, price), as_json)
        return
    wanted = stages.only
    with naming(config):
        if cluster:
            _clusters(wanted, cluster, top, as_json)
        elif curve:
            _curve(wanted, curve, as_json)
        elif max_model:
            _largest_model(wanted, max_model, as_json)
        elif max_batch or max_length:
            _largest(wanted, max_length, fit, as_json)
        else:
            _plans(stages, fit, (watts, price), as_json, html)


def _plans(stages: Stages, size: str, costs: Costs, as_json: bool, html: str = "") -> None:
    """The plan of every run of a file, one after the other."""
    from tunesmith.run.staged import prepare_stage
    from tunesmith.run.stages import naming_stage

    made = []
    for stage in stages.stages:
        if stages.is_list and not as_json:
            typer.echo(f"stage {stage.name}")
        with naming_stage(stages, stage):
            made.append({"name": stage.name, **_plan(prepare_stage(stages, stage), size, html, costs, as_json)})
    if as_json:
        _print_json({"stages": made} if stages.is_list else {key: made[0][key] for key in made[0] if key != "name"})


def _plan(prepared: Prepared, size: str, html: str, costs: Costs, quiet: bool) -> dict[str, Any]:
    """A plan as plain values, shown unless `quiet`."""
    from tunesmith.core.amounts import read_bytes
    from tunesmith.plan.bill import local_bill, show_local_bill
    from tunesmith.plan.fit import show_fit
    from tunesmith.plan.room import free_bytes
    from tunesmith.plan.show import show_plan
    from tunesmith.run.fitting import fit_run
    from tunesmith.run.planning import plan_run

    room, free = read_bytes(size, "--fit") if size else None, free_bytes()
    found: Plan = plan_run(prepared)
    made = {**found.as_dict(), **_more(prepared, found)}
    if found.seconds is not None:
        made["bill"] = local_bill(found.seconds, found.flops, prepared.config.layout.processes, *costs).as_dict()
    # what instead, whenever it does not fit
    if room is not None or found.memory.resident_bytes > free:
        made["fit"] = fit_run(prepared.config, room or free, prepared, found).as_dict()
    if html:
        from tunesmith.run.plan_page import write_page

        write_page(html, prepared, found, made)
    if quiet:
        return made
    from rich.console import Console

    console = Console(highlight=False)
    console.print(show_plan(made))
    if "bill" in made:
        console.print(show_local_bill(made["bill"]), soft_wrap=True)
    for line in show_fit(made["fit"]) if "fit" in made else []:
        console.print(line, soft_wrap=True)
    return made


def _more(prepared: Prepared, found: Plan) -> dict[str, Any]:
    """What a plan's numbers come to: the data, its amount, energy, and how far past plans were off."""
    from tunesmith.run.plan_facts import facts

    return facts(prepared, found)


def _largest(config: Config, length: bool, size: str, as_json: bool) -> None:
    from tunesmith.core.amounts import in_bytes, read_bytes
    from tunesmith.plan.room import free_bytes
    from tunesmith.run.fitting import largest_setting

    room = read_bytes(size, "--fit") if size else free_bytes()
    micro = "micro_batch_rows" if config.train.micro_batch_rows else "micro_batch_tokens"
    key = "data.max_length" if length else f"train.{micro}"
    value, needed = largest_setting(config, key, room)
    if as_json:
        _print_json({"key": key, "largest": value, "needed_bytes": needed, "room_bytes": room})
    elif value:
        typer.echo(f"{key}={value} needs {in_bytes(needed)} and fits into {in_bytes(room)}")
    else:
        typer.echo(f"no {key} fits into {in_bytes(room)}: the smallest needs {in_bytes(needed)}")


def _largest_model(config: Config, size: str, as_json: bool) -> None:
    from tunesmith.core.amounts import read_bytes
    from tunesmith.run.sizing import largest_model, show_largest_model

    found = largest_model(config, read_bytes(size, "--max-model")).as_dict()
    if as_json:
        _print_json(found)
        return
    for line in show_largest_model(found):
        typer.echo(line)


def _curve(config: Config, folder: str, as_json: bool) -> None:
    from pathlib import Path

    from tunesmith.run.curving import find_curve, show_curve

    found = find_curve(config, Path(folder)).as_dict()
    if as_json:
        _print_json(found)
        return
    for line in show_curve(found):
        typer.echo(line)


def _clusters(config: Config, cluster: str, top: int, as_json: bool) -> None:
    from tunesmith.run.placing import placed, read_cluster

    made = placed(config, read_cluster(cluster), top)
    if as_json:
        _print_json(made)
        return
    from rich.console import Console

    from tunesmith.plan.show_layouts import show_layouts

    Console(highlight=False).print(show_layouts(made))


def _history(has_config: bool, folder: str, as_json: bool) -> None:
    from pathlib import Path

    from tunesmith.core.errors import ConfigError
    from tunesmith.plan.history import history_of, show_history

    if has_config:
        raise ConfigError("takes no CONFIG", where="plan --history", hint="tunesmith plan --history runs")
    found = history_of(Path(folder))
    if as_json:
        _print_json(found.as_dict())
        return
    for line in show_history(found):
        typer.echo(line)


def _formats(has_config: bool, asked: bool, as_json: bool) -> None:
    from tunesmith.core.errors import ConfigError

    if has_config or not asked:
        told = "takes no CONFIG with --formats" if asked else "needs a CONFIG, --history or --formats"
        raise ConfigError(told, where="plan", hint="tunesmith plan CONFIG, or tunesmith plan --formats")
    from tunesmith.plan.formats import formats, show_formats

    table = formats()
    if as_json:
        _print_json([one.as_dict() for one in table])
        return
    from rich.console import Console

    Console(highlight=False).print(show_formats(table))


def _print_json(value: Any) -> None:
    from tunesmith.cli.main import print_json

    print_json(value)
