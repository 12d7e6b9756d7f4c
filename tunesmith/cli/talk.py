"""Commands that make a model write: generate for many prompts, chat in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
    out: Annotated[str | None, typer.Option("--out", help="Write answers to --data here, as rows to tune on.")] = None,
    best_of: Annotated[int, typer.Option("--best-of", min=1, max=4096, help="Samples a prompt; the best is kept.")] = 1,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", help="As objective.reward: a name, {kind: X, ...}, file.py:function, a reward run."),
    ] = None,
    above: Annotated[float | None, typer.Option("--above", help="Keep all samples that earn so much.")] = None,
    as_json: Json = False,
) -> None:
    """Write answers to prompts: greedy unless --temperature is above 0.

    With --out they become rows to tune on: those of a teacher, or the best by a reward. The same command goes on where
    it was cut.
    """
    if bool(prompt) == bool(data):
        raise ConfigError("give either --prompt or --data", hint='tunesmith generate MODEL --prompt "..."')
    if out is not None:
        if not data or system is not None:
            raise ConfigError("rows are answers to those of --data, as they are", where="--out")
        from tunesmith.run.drawing import Drawing, draw_rows, read_rewards

        drawing = Drawing(best_of, max_tokens, temperature, seed, read_rewards(reward or ()), above)
        _show_drawn(draw_rows(model, data, out, drawing, rows, template), as_json)
        return
    if best_of > 1 or reward or above is not None:
        raise ConfigError("--best-of, --reward and --above choose what is written to --out", where="--out")
    from tunesmith.run.speaking import Speaker

    speaker = Speaker(model, template=template)
    dialogues = speaker.from_data(data, rows) if data else [speaker.dialogue(text, system) for text in prompt or []]
    answers = speaker.answer(dialogues, max_new_tokens=max_tokens, temperature=temperature, seed=seed)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(answers)
        return
    for answer in answers:
        typer.echo(answer["completion"])


def _show_drawn(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(told)
        return
    for one in told["best_of"]:
        typer.echo(f"best of {one['n']}: reward {one['reward']:.4g}, at most {one['divergence_bound']:.3f} nats away")
    typer.echo(f"{told['out']}: {told['kept']} rows of {told['prompts']} prompts", err=True)


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
