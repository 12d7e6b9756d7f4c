"""YAML 1.2 as plain data: `1e-4` is a number, `no` a string, and nothing that could surprise is allowed.

Refused before anything is built: duplicate keys, anchors and aliases, tags, deep nesting, large files.
"""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ConfigError, did_you_mean
from tunesmith.core.files import os_error

MAX_BYTES = 256_000
MAX_DEPTH = 32


def read_yaml(path: Path | str) -> Any:
    """The one document in a YAML file. Raises ConfigError with line and column."""
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError("this is a folder, expected a YAML file", where=str(path))
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("not a regular file", where=str(path))
        if status.st_size > MAX_BYTES:
            raise ConfigError(f"{status.st_size} bytes are too many for a configuration", where=str(path))
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            "no such file",
            where=str(path),
            hint=_similar(path) or "`tunesmith init` writes a starting configuration",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text; save it as UTF-8", where=str(path)) from error
    except ConfigError:
        raise
    except OSError as error:
        raise os_error(path, error) from error
    return read_yaml_text(text, where=str(path))


def _similar(path: Path) -> str:
    folder = path.parent
    return did_you_mean(path.name, [file.name for file in folder.glob("*.y*ml")]) if folder.is_dir() else ""


def read_yaml_text(text: str, where: str) -> Any:
    """The one document in a YAML text. Raises ConfigError with line and column."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    reader: Any = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = False
    try:
        _refuse_surprises(reader, text, where)
        return reader.load(io.StringIO(text))
    except YAMLError as error:
        raise ConfigError(_reason(error), where=f"{where}{_place(error, text)}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"cannot be read: {error}", where=where) from error


def write_yaml_text(value: Any) -> str:
    """Plain data as YAML with its keys in the given order."""
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    writer.dump(value, stream)
    return stream.getvalue()


def _refuse_surprises(reader: Any, text: str, where: str) -> None:
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

    depth = 0
    for event in reader.parse(io.StringIO(text)):
        place = f"{where}:{event.start_mark.line + 1}"
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            raise ConfigError("anchors and aliases (& and *) are not allowed; write the value out", where=place)
        if getattr(event, "tag", None):
            raise ConfigError(f"the tag {event.tag} is not allowed; plain values only", where=place)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError("nested too deeply", where=place)


def _place(error: Any, text: str) -> str:
    position = getattr(error, "position", None)
    if isinstance(position, int):  # a character that may not be there at all
        return f":{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _reason(error: Any) -> str:
    problem = str(getattr(error, "problem", None) or error)
    context, mark = getattr(error, "context", None) or "", getattr(error, "context_mark", None)
    if "'\\t'" in problem:
        return "a tab; YAML is indented with spaces"
    if "another document" in problem:
        return "a second document begins here; a configuration is one, without `---` inside"
    if "end of stream" in problem and context and mark:
        return f"the file ends {context}, which begins in line {mark.line + 1}"
    return " ".join(problem.split("\n")[0].split())
