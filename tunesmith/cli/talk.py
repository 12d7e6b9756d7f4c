"""Commands that make a model write: generate for many prompts, chat in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tunesmith.cli.arguments import Json, MaxTokens, Model, Seed, Temperature, Template
from tunesmith.core.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Adds this file's commands to the program."""
    app.command()(generate)
    app.command()(chat)


def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given again.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows whose prompts are answered.")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only the first so many rows of --data.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message before each --prompt.")] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    template: Template = "auto",
    as_json: Json = False,
) -> None:
    """Write answers to prompts: greedy unless --temperature is above 0."""
    from tunesmith.run.speaking import Speaker

    if bool(prompt) == bool(data):
        raise ConfigError("give either --prompt or --data", hint='tunesmith generate MODEL --prompt "..."')
    speaker = Speaker(model, template=template)
    dialogues = speaker.from_data(data, rows) if data else [speaker.dialogue(text, system) for text in prompt or []]
    answers = speaker.answer(dialogues, max_new_tokens=max_tokens, temperature=temperature, seed=seed)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(answers)
        return
    for answer in answers:
        typer.echo(answer["completion"])


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="A system message at the start.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    template: Template = "auto",
) -> None:
    """Talk to a model in the terminal; answers appear as they are written. /new starts over, /quit ends."""
    from tunesmith.run.speaking import Speaker

    speaker = Speaker(model, template=template)
    talk = speaker.conversation(system)
    typer.echo("/new starts over, /quit (or Ctrl-D) ends", err=True)
    while True:
        try:
            words = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if words == "/quit":
            return
        if words == "/new":
            talk = speaker.conversation(system)
        elif words:
            try:
                for piece in talk.say(words, max_new_tokens=max_tokens, temperature=temperature, seed=seed):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                # stops this answer, not the conversation
                talk.forget_last()
            sys.stdout.write("\n")
