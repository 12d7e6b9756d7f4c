"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; `tunesmith init` writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace those of the file, as in train.lr=1e-4."),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="Bundled name, model folder, .gguf file, hub id, or a run folder.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for programs.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="At most so many new tokens per answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")]
Seed = Annotated[int, typer.Option("--seed", help="For sampling at a temperature above 0.")]
Template = Annotated[
    str, typer.Option("--template", help="auto (the model's own), alpaca, dolly, plain, or a .jinja file.")
]
