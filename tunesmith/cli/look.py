"""The command that looks at settings and data before anything is paid: check."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tunesmith.cli.arguments import ConfigFile, Json, Overrides


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command()(check)


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="How many example rows to show.")] = 2,
    as_json: Json = False,
) -> None:
    """Validate CONFIG and its data, all problems at once, and show rows as the model will see them.

    What the model learns to write is marked; control tokens are dim. Weights are not loaded.
    """
    from tunesmith.run.staged import prepare_stage
    from tunesmith.run.stages import load_stages, naming_stage

    stages = load_stages(config, overrides)
    facts: list[dict[str, Any]] = []
    for stage in stages.stages:
        with naming_stage(stages, stage):
            prepared = prepare_stage(stages, stage)
        facts.append({"name": stage.name, **prepared.data_facts()})
        if as_json:
            continue
        if stages.is_list:
            typer.echo(f"stage {stage.name}")
        for line in prepared.lines():
            typer.echo(line)
        _show_rows(prepared.train, rows)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json({"ok": True, **({"stages": facts} if stages.is_list else prepared.data_facts())})
        return
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
        rank = f", {preview.rank}" if preview.rank else ""
        console.rule(f"{preview.where}{rank}: {preview.tokens} tokens{learnt_tokens}", align="left")
        console.print(text)
        if preview.labels:
            labels = " ".join(preview.labels)
            console.print(Text.assemble(("learns to predict: ", "dim"), (labels, "bold green")))
            continue
        if preview.rank and not preview.supervised_tokens:  # an encoder reads an answer to score it
            continue
        if dataset.answered:
            console.print(Text.assemble(("writes after it: ", "dim"), f"up to {dataset.answered} tokens of its own"))
            continue
        # colour alone does not survive a pipe or a colour-blind reader
        learnt = "".join(piece.text for piece in preview.pieces if piece.supervised)
        what = f"answer, {preview.rank}: " if preview.rank else "learns to write: "
        console.print(Text.assemble((what, "dim"), (learnt, "bold green")))
    if rows:
        console.rule()
