"""Commands to begin with: init writes a configuration, and lists of what there is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.core.errors import ConfigError, ResourceError, did_you_mean
from tunesmith.core.files import os_error


def register(app: typer.Typer) -> None:
    """Adds this file's commands to the program."""
    app.command()(init)
    app.command()(recipes)
    app.command()(methods)
    app.command()(models)


def init(
    recipe: Annotated[str | None, typer.Argument(help="Which recipe to start from; leave out to see them.")] = None,
) -> None:
    """Write a commented starting configuration, RECIPE.yaml; never over an existing file."""
    if recipe is None:
        recipes()
        return
    text = _recipe_text(recipe)
    path = Path(f"{recipe}.yaml")
    try:
        with open(path, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise ConfigError("this file exists already", where=str(path), hint="rename it, or start elsewhere") from error
    except ResourceError:
        raise
    except OSError as error:
        raise os_error(path, error) from error
    typer.echo(f"wrote {path}; next: tunesmith check {path}", err=True)


def recipes() -> None:
    """Starting configurations, with one line each."""
    for name in _recipe_names():
        first = _recipe_text(name).splitlines()[0].lstrip("# ")
        typer.echo(f"{name:20} {first}")


def methods() -> None:
    """Adaptation methods, with one line each."""
    from tunesmith.adapt.methods import METHODS

    for name in METHODS.names():
        typer.echo(f"{name:20} {METHODS.summary(name)}")


def models() -> None:
    """Bundled models, and what else `model:` takes."""
    from tunesmith.models.bundled import MODELS

    for name, model in MODELS.items():
        typer.echo(f"{name:20} {model.summary}")
    typer.echo("\nor a folder with a Hugging Face checkpoint, a .gguf file, or a hub id", err=True)


def _recipe_names() -> list[str]:
    folder = resources.files("tunesmith.recipes")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _recipe_text(name: str) -> str:
    names = _recipe_names()
    if name not in names:
        raise ConfigError(f"{name!r} is no recipe; there are {' '.join(names)}", hint=did_you_mean(name, names))
    return resources.files("tunesmith.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
