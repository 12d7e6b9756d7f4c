"""The command that measures: one or several models on held-out rows, with confidence intervals."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tunesmith.cli.arguments import Json, MaxTokens, Template


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command()(evaluate)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL_OR_RUN...", help="Models, model folders or run folders to judge.")
    ],
    data: Annotated[str, typer.Option("--data", help="Held-out rows: bundled name, file, glob or hub id.")],
    metrics: Annotated[str, typer.Option("--metrics", help="Names with commas, as in loss,bleu,rougeL.")] = "loss",
    max_tokens: MaxTokens = 64,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only the first so many rows.")] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Solved examples before each prompt.")] = 0,
    shots_from: Annotated[str | None, typer.Option("--shots-from", help="Where the solved examples come from.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also judge a constant answer and a copy of the prompt.")
    ] = False,
    data_format: Annotated[str, typer.Option("--format", help="Format of the rows.")] = "auto",
    template: Template = "auto",
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Tokens of a row; the run's without, else 1024.")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp32, bf16, fp16, or auto.")] = "auto",
    out: Annotated[str | None, typer.Option("--out", help="Folder for eval.json and samples.jsonl.")] = None,
    as_json: Json = False,
) -> None:
    """Measure models on held-out rows: metrics with 95 % intervals, several models side by side."""
    from tunesmith.run.judging import Question, judge_models

    question = Question(
        data=data,
        metrics=tuple(name.strip() for name in metrics.split(",") if name.strip()),
        max_new_tokens=max_tokens,
        rows=rows,
        shots=shots,
        shots_from=shots_from,
        baselines=baselines,
        data_format=data_format,
        template=template,
        max_length=max_length,
        precision=precision,
    )
    answer = judge_models(models, question, out=out)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(answer)
        return
    from rich.console import Console

    from tunesmith.evaluate.table import metrics_table, table_width

    Console(highlight=False, width=table_width(sys.stdout)).print(metrics_table(answer))
