"""The command that asks people, or a model, which answers are better; and the figures of what they said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.arguments import Json, MaxTokens, Seed, Temperature, Template
from tunesmith.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from tunesmith.compare.serving import Address
    from tunesmith.compare.store import Store
    from tunesmith.run.comparison import Writer

FORMS = ("preference", "ranking")
Database = Annotated[
    str | None,
    typer.Option("--database", envvar="TUNESMITH_DATABASE", help="PostgreSQL instead of a file, as a SQLAlchemy URL."),
]


def register(app: typer.Typer) -> None:
    """Adds this file's commands to the program."""
    app.command()(compare)
    app.command()(report)


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL_OR_RUN...]", help="Who answers; MODEL@URL is one behind a server."),
    ] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Rows whose prompts are answered.")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only the first so many prompts.")] = None,
    out: Annotated[str, typer.Option("--out", help="Folder of the comparison.")] = "runs/compare",
    samples: Annotated[int, typer.Option("--samples", min=1, max=16, help="Answers of each model.")] = 1,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    template: Template = "auto",
    judge: Annotated[
        str | None, typer.Option("--judge", help="A model that judges, every pair in both orders.")
    ] = None,
    import_: Annotated[str | None, typer.Option("--import", help="Comparisons that others have made.")] = None,
    export: Annotated[str | None, typer.Option("--export", help="Write judgements as rows, and stop.")] = None,
    form: Annotated[str | None, typer.Option("--as", help="Rows of --export: preference or ranking.")] = None,
    annotators: Annotated[str | None, typer.Option("--annotators", help="As in ann,bob,carol:author.")] = None,
    overlap: Annotated[int | None, typer.Option("--overlap", min=1, help="Annotators that judge each prompt.")] = None,
    rubric: Annotated[str | None, typer.Option("--rubric", help="Criteria to score from 1 to 5, with commas.")] = None,
    host: Annotated[str, typer.Option("--host", help="Another address needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8321,
    url: Annotated[str | None, typer.Option("--url", help="What people open, where it is not the address.")] = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Stop when answers are there.")] = False,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Let people judge answers side by side: sample them from models, serve a page, keep every judgement.

    The same command goes on where it was. `tunesmith compare FOLDER` opens a comparison again.
    """
    folder, sources = _place(list(models or []), prompts, Path(out), import_, database)
    _check(sources, prompts, form, folder, import_, database)
    need_packages()
    from tunesmith.compare.serving import Address
    from tunesmith.core.files import FolderLock
    from tunesmith.run import comparison
    from tunesmith.run.folder import check_writable

    address = Address(host, port, url)
    key = None if export is not None or no_serve else _key(address)
    check_writable(folder)
    sampling = comparison.Sampling(samples, max_tokens, temperature, seed, template)
    filling = comparison.Filling(sources, prompts, rows, import_, sampling)
    judges = comparison.open_writers([judge] if judge else [], template)
    folder.mkdir(parents=True, exist_ok=True)
    if export is not None:
        _export(comparison.open_store(folder, database), Path(export), form, as_json)
        return
    with FolderLock(folder):
        store = comparison.open_store(folder, database)
        filling.put(store)
        _set(store, overlap, rubric)
        for name, write in judges.items():
            _judge(store, name, write)
        if no_serve:
            _say(f"{folder}: `tunesmith compare {folder}` opens it, `tunesmith report {folder}` shows what was judged")
        else:
            _serve(store, folder, address, key, annotators, as_json)


def report(
    folder: Annotated[str, typer.Argument(metavar="RUN_OR_COMPARISON", help="A run folder, or that of a comparison.")],
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Write the page of figures of a run or a comparison; of a comparison, show them, too."""
    if database is None and not _is_comparison(folder):
        from tunesmith.evaluate.report import write_report

        path = write_report(folder)
        if as_json:
            from tunesmith.cli.main import print_json

            print_json({"page": str(path)})
        else:
            typer.echo(path)
        return
    need_packages()
    from tunesmith.run import comparison

    found = comparison.report(comparison.open_store(Path(folder), database), Path(folder), folder)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json(found)
        return
    from rich.console import Console

    from tunesmith.evaluate.comparison_table import comparison_table
    from tunesmith.evaluate.table import table_width

    Console(highlight=False, width=table_width(sys.stdout)).print(comparison_table(found))
    _say(f"\npage {Path(folder) / 'report.html'}")


def need_packages() -> None:
    """Raises ConfigError where the extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("sqlalchemy", "starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        hint = 'pip install "tunesmith[compare]"'
        raise ConfigError(f"needs the packages {', '.join(missing)}", where="compare", hint=hint)


def _is_comparison(folder: str) -> bool:
    # said here, too, so that a report of a run needs no database
    return (Path(folder) / "compare.sqlite").is_file()


def _place(
    sources: list[str], prompts: str | None, out: Path, import_: str | None, database: str | None
) -> tuple[Path, list[str]]:
    """The folder of the comparison, and who answers: a single name may be that of a comparison."""
    if len(sources) == 1 and prompts is None and (_is_comparison(sources[0]) or import_ is not None or database):
        return Path(sources[0]), []
    return out, sources


def _check(
    sources: list[str], prompts: str | None, form: str | None, folder: Path, import_: str | None, database: str | None
) -> None:
    if form is not None and form not in FORMS:
        raise ConfigError(f"{form!r} is neither {' nor '.join(FORMS)}", where="--as", hint=did_you_mean(form, FORMS))
    if sources and prompts is None:
        told = f"{', '.join(sources)}: no such comparison, and no prompts to ask"
        raise ConfigError(told, where="compare", hint="add --prompts ROWS to sample answers")
    if prompts is not None and not sources:
        raise ConfigError(
            "nobody answers them", where="--prompts", hint="name models: tunesmith compare A B --prompts ROWS"
        )
    if not sources and import_ is None and database is None and not _is_comparison(str(folder)):
        hint = "tunesmith compare A B --prompts ROWS, or tunesmith compare --import FILE"
        raise ConfigError("there is no comparison here", where=str(folder), hint=hint)


def _key(address: Address) -> str | None:
    from tunesmith.compare.links import own_key

    key = own_key()
    address.check(key)
    return key


def _set(store: Store, overlap: int | None, rubric: str | None) -> None:
    changed = {"overlap": overlap, "rubric": None if rubric is None else _names(rubric)}
    store.set({name: value for name, value in changed.items() if value is not None})


def _judge(store: Store, source: str, write: Writer) -> None:
    from tunesmith.run.comparison import open_turns
    from tunesmith.run.model_judge import judge

    done = judge(store, open_turns(store), source, write)
    same = f"{done.consistent} of {done.pairs} pairs the same in both orders"
    _say(f"{source}: judged {done.prompts} prompts; {same}, {done.unreadable} without a verdict")


def _export(store: Store, path: Path, form: str | None, as_json: bool) -> None:
    from tunesmith.run.comparison import export_rows

    count, chosen, left_out = export_rows(store, path, form)
    if as_json:
        from tunesmith.cli.main import print_json

        print_json({"rows": count, "format": chosen, "left_out": left_out})
    told = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    _say(f"{path}: {count} rows of the format {chosen}{f'; left out: {told}' if told else ''}")


def _serve(
    store: Store, folder: Path, address: Address, key: str | None, annotators: str | None, as_json: bool
) -> None:
    from tunesmith.compare.app import Page
    from tunesmith.compare.links import open_links
    from tunesmith.compare.serving import serve
    from tunesmith.compare.store import APART
    from tunesmith.run import comparison

    items = comparison.comparable(store.items())
    if not items:
        raise ConfigError(
            "no prompt has two answers to compare", where=str(folder), hint="name two models, or --samples 2"
        )
    there = [name for name, group in store.annotators() if group not in APART]
    for told in _names(annotators or ("" if there else "you")):
        name, _, group = told.partition(":")
        store.add_annotator(name, group or None)
    people = [name for name, group in store.annotators() if group not in APART]
    links = open_links(folder, key)
    opened = address.open()
    number = opened.getsockname()[1]
    base = address.base(number)
    page = Page(comparison.open_turns(store), links, comparison.Live(store, str(folder)))
    by_name = {name: links.annotator(base, name) for name in people}

    def ready() -> None:
        if as_json:
            from tunesmith.cli.main import print_json

            print_json({"annotators": by_name, "statistics": links.statistics(base)})
        else:
            _say(f"{len(items)} prompts to judge; each link is a key, give each to one person; Ctrl-C ends")
            for name, link in (*by_name.items(), ("statistics", links.statistics(base))):
                typer.echo(f"{name}  {link}")
        sys.stdout.flush()

    serve(page.app(address.origins(number)), opened, ready)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _say(text: str) -> None:
    typer.echo(text, err=True)
