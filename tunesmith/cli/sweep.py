"""The command that compares methods under one budget of parameters."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from tunesmith.cli.arguments import ConfigFile, Json, Overrides
from tunesmith.core.errors import ConfigError

_PREFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def register(app: typer.Typer) -> None:
    """Adds this file's command to the program."""
    app.command(name="sweep")(sweep)


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Trained parameters, as in 1.2M or 300k.")] = None,
    within: Annotated[float, typer.Option("--within", min=0.0, max=1.0, help="Share it may be off.")] = 0.05,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each, from train.seed on.")] = 3,
    methods: Annotated[str | None, typer.Option("--methods", help="As in lora-qv,adapter,full; all without.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="LoRA: weight types at the budget, and ranks.")] = False,
    ranks: Annotated[str | None, typer.Option("--ranks", help="Ranks of that table, as in 1,2,4,8,64.")] = None,
    halving: Annotated[bool, typer.Option("--halving", help="Short runs choose who gets full ones.")] = False,
    lr: Annotated[list[str] | None, typer.Option("--lr", help="KIND=VALUE, as in --lr full=1e-5.")] = None,
    forgetting: Annotated[str, typer.Option("--forgetting", help="General text, or none.")] = "auto",
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, help="Stop then; go on another time.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder, instead of the configuration's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods under one BUDGET of trained parameters: several seeds each, one table.

    Every method is sized to the budget by counting what it attaches to the model. Trials are ordinary runs below
    OUT/trials; the same command goes on where a stopped sweep was.
    """
    from tunesmith.config import load_config
    from tunesmith.run.spaces import Wanted
    from tunesmith.run.sweep import Order, plan_sweep

    wanted = Wanted(
        budget=_count(budget),
        within=within,
        methods=_names(methods),
        grid=grid,
        ranks=tuple(_whole(rank, "--ranks") for rank in _names(ranks)),
    )
    read = load_config(config, overrides)
    order = Order(wanted, seeds, out, None if forgetting == "none" else forgetting, minutes, halving, _rates(lr))
    planned = plan_sweep(read, order)
    _print(_plan_table(planned), stderr=not dry_run or as_json)
    if dry_run:
        if as_json:
            from tunesmith.cli.main import print_json

            print_json(planned.as_dict())
        return
    _finish(planned, as_json)


def _finish(planned: Any, as_json: bool) -> None:
    from tunesmith.evaluate.sweep_table import sweep_table
    from tunesmith.run.sweeping import run_sweep

    found = run_sweep(planned)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(found)
    elif found:
        _print(sweep_table(found))
    typer.echo(f"\ntable {planned.folder / 'table.md'}\npage {planned.folder / 'sweep.html'}", err=True)


def _plan_table(planned: Any) -> Any:
    from tunesmith.run.sweep import plan_table

    return plan_table(planned)


def _print(what: Any, stderr: bool = False) -> None:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 200
    Console(file=stream, highlight=False, width=width).print(what)


def _count(text: str | None) -> int | None:
    """1.2M, 300k or 1200000 as a number."""
    if text is None:
        return None
    scale = _PREFIXES.get(text[-1:].lower(), 1)
    try:
        found = float(text[:-1] if scale > 1 else text.replace(",", "").replace("_", "")) * scale
    except ValueError:
        found = 0
    if not 1 <= found < 1e15:
        raise ConfigError(f"{text!r} is no number of parameters", where="--budget", hint="as in 1.2M, 300k or 294912")
    return round(found)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _whole(text: str, where: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{text!r} is no whole number above 0", where=where)
    return int(text)


def _rates(given: list[str] | None) -> dict[str, float]:
    found = {}
    for text in given or ():
        kind, _, value = text.partition("=")
        try:
            found[kind] = float(value)
        except ValueError:
            found[kind] = 0.0
        if not 0 < found[kind] < 1e6:
            raise ConfigError(f"{text!r} is not of the form KIND=VALUE", where="--lr", hint="as in --lr full=1e-5")
    return found
