"""The tables of a comparison, in SQLite or PostgreSQL, and the connection to them.

The one idea: judgements are only ever added. Taking one back is a row that names it; the standing judgements are those
that no row takes back. What is done with the tables is in `store`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from tunesmith.core.errors import ConfigError, ResourceError

BUSY_SECONDS = 30

tables = MetaData()
settings = Table("settings", tables, Column("key", String(64), primary_key=True), Column("value", JSON, nullable=False))
prompts = Table(
    "prompts",
    tables,
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), unique=True, nullable=False),
    Column("messages", JSON, nullable=False),
)
answers = Table(
    "answers",
    tables,
    Column("id", Integer, primary_key=True),
    Column("prompt", ForeignKey("prompts.id"), nullable=False),
    Column("system", Text, nullable=False),
    # several answers of one system are numbered from 1
    Column("sample", Integer, nullable=False),
    Column("text", Text, nullable=False),
    UniqueConstraint("prompt", "system", "sample"),
)
annotators = Table(
    "annotators",
    tables,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), unique=True, nullable=False),
    Column("group", String(64), nullable=False),
)
# who is looking at which prompt, so that two people at once are not given the same last place of it
shown = Table(
    "shown",
    tables,
    Column("prompt", ForeignKey("prompts.id"), primary_key=True),
    Column("annotator", ForeignKey("annotators.id"), primary_key=True),
    Column("until", Float, nullable=False),
)
judgements = Table(
    "judgements",
    tables,
    Column("id", Integer, primary_key=True),
    Column("client", String(64), unique=True, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("annotator", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("prompt", ForeignKey("prompts.id"), nullable=False, index=True),
    # how often the annotator had taken a judgement of this prompt back: with it no two can stand at once
    Column("turn", Integer, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("answers", JSON, nullable=False),
    Column("ranks", JSON),
    Column("comment", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("at", Float, nullable=False),
    UniqueConstraint("annotator", "prompt", "turn"),
)
undone = Table(
    "undone",
    tables,
    Column("judgement", ForeignKey("judgements.id"), primary_key=True),
    Column("client", String(64), unique=True, nullable=False),
    Column("at", Float, nullable=False),
)
scores = Table(
    "scores",
    tables,
    Column("judgement", ForeignKey("judgements.id"), primary_key=True),
    Column("answer", ForeignKey("answers.id"), primary_key=True),
    Column("criterion", String(64), primary_key=True),
    Column("value", Integer, nullable=False),
)


def connect(url: str) -> Engine:
    """An engine for a SQLAlchemy URL whose tables exist.

    SQLite waits for other writers, keeps a write-ahead log and flushes it at every commit (synchronous = FULL), so what
    is committed survives a kill and a loss of power. PostgreSQL does so by default.

    Raises:
        ConfigError: not a URL, a database of another kind, or its driver is missing.
        ResourceError: the database cannot be reached or written.
    """
    try:
        address = make_url(url)
        told = address.render_as_string(hide_password=True)
        if address.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigError(f"{told} is neither SQLite nor PostgreSQL", where="--database")
        engine = create_engine(address, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        hint = "as in postgresql+psycopg://user@host/name; the password belongs into ~/.pgpass"
        raise ConfigError("not the URL of a database", where="--database", hint=hint) from error
    except ModuleNotFoundError as error:
        hint = 'pip install "tunesmith[postgresql]", and write postgresql+psycopg://'
        raise ConfigError(f"needs the package {error.name}", where="--database", hint=hint) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up)
        event.listen(engine, "begin", _begin)
    try:
        tables.create_all(engine)
    except OperationalError as error:
        raise ResourceError(f"the database cannot be used: {reason(error)}", where=told) from error
    return engine


def reason(error: Exception) -> str:
    """The driver's own words in one line, without the statement."""
    original = getattr(error, "orig", None) or error
    return " ".join(str(original).split()) or type(original).__name__


def _set_up(connection: Any, _: Any) -> None:
    # no transaction of the driver's own: `_begin` says when one begins
    connection.isolation_level = None
    for line in (
        f"busy_timeout = {1000 * BUSY_SECONDS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {line}")


def _begin(connection: Any) -> None:
    # at once for writing: one that reads first and writes later could find that another has written between
    mode = "" if connection.get_execution_options().get("reading") else " IMMEDIATE"
    connection.exec_driver_sql(f"BEGIN{mode}")
