"""Commands that look before anything is paid: check (data and settings) and plan (memory and cost)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.arguments import ConfigFile, Json, Overrides

if TYPE_CHECKING:
    from tunesmith.config import Config


def register(app: typer.Typer) -> None:
    """Adds this file's commands to the program."""
    app.command()(check)
    app.command()(plan)


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="How many example rows to show.")] = 2,
    as_json: Json = False,
) -> None:
    """Validate CONFIG and its data, all problems at once, and show rows as the model will see them.

    What the model learns to write is marked; control tokens are dim. Weights are not loaded.
    """
    from tunesmith.config import load_config, naming
    from tunesmith.run.prepare import prepare

    wanted = load_config(config, overrides)
    with naming(config):
        prepared = prepare(wanted)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json({"ok": True, **prepared.data_facts()})
        return
    for line in prepared.lines():
        typer.echo(line)
    _show_rows(prepared.train, rows)
    typer.echo("ok: nothing to mend")


def _show_rows(dataset: Any, rows: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for preview in dataset.preview(rows):
        text = Text()
        for piece in preview.pieces:
            text.append(piece.text, style="bold green" if piece.supervised else "dim" if piece.control else "")
        no_learnt = preview.labels or dataset.answered
        learnt_tokens = "" if no_learnt else f", {preview.supervised_tokens} supervised"
        console.rule(f"{preview.where}: {preview.tokens} tokens{learnt_tokens}", align="left")
        console.print(text)
        if preview.labels:
            labels = " ".join(preview.labels)
            console.print(Text.assemble(("learns to predict: ", "dim"), (labels, "bold green")))
            continue
        if dataset.answered:
            console.print(Text.assemble(("writes after it: ", "dim"), f"up to {dataset.answered} tokens, rewarded"))
            continue
        # colour alone does not survive a pipe or a colour-blind reader
        learnt = "".join(piece.text for piece in preview.pieces if piece.supervised)
        console.print(Text.assemble(("learns to write: ", "dim"), (learnt, "bold green")))
    if rows:
        console.rule()


def plan(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="A YAML file, as `tunesmith init` writes it.")] = "",
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option("--cluster", metavar="FILE", help="A YAML file of nodes: ranks the layouts on them instead.")
    ] = "",
    top: Annotated[int, typer.Option("--top", min=1, help="How many layouts of a cluster to show.")] = 10,
    formats: Annotated[bool, typer.Option("--formats", help="Show the formats of numbers instead of a plan.")] = False,
    as_json: Json = False,
) -> None:
    """Say before anything is paid what CONFIG needs: parameters, memory, steps, tokens, FLOPs, time.

    With --cluster: how the model would lie on machines that are only described, every layout, the fastest first.
    """
    if formats or not config:
        _formats(bool(config), formats, as_json)
        return
    from tunesmith.config import load_config, naming

    wanted = load_config(config, overrides)
    with naming(config):
        made = _placed(wanted, cluster, top) if cluster else _planned(wanted)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(made)
        return
    from rich.console import Console

    from tunesmith.plan.show import show_plan
    from tunesmith.plan.show_layouts import show_layouts

    Console(highlight=False).print(show_layouts(made) if cluster else show_plan(made))


def _planned(config: Config) -> dict[str, Any]:
    from tunesmith.run.planning import plan_run
    from tunesmith.run.prepare import prepare

    return plan_run(prepare(config)).as_dict()


def _placed(config: Config, cluster: str, top: int) -> dict[str, Any]:
    from tunesmith.run.placing import rank_layouts, read_cluster

    return rank_layouts(config, read_cluster(cluster)).as_dict(top)


def _formats(has_config: bool, asked: bool, as_json: bool) -> None:
    from tunesmith.core.errors import ConfigError

    if has_config or not asked:
        told = "takes no CONFIG with --formats" if asked else "needs a CONFIG, or --formats"
        raise ConfigError(told, where="plan", hint="tunesmith plan CONFIG, or tunesmith plan --formats")
    from tunesmith.plan.formats import formats, show_formats

    table = formats()
    if as_json:
        from tunesmith.cli.main import print_json

        print_json([one.as_dict() for one in table])
        return
    from rich.console import Console

    Console(highlight=False).print(show_formats(table))
