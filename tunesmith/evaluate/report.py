"""The page that tells what a run did: one HTML file that needs nothing else and asks the network for nothing.

It reads what the run folder holds and leaves out what is not there. Model output is hostile input: everything is
escaped, and a content policy allows no script, no image and only this page's own style. What the page says is put
together in `story`, its pictures in `plots`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tunesmith.core.amounts import in_bytes, in_count, in_time
from tunesmith.core.errors import ConfigError, DataError
from tunesmith.core.files import os_error, read_json, strict_loads, write_atomic
from tunesmith.core.visible import visible
from tunesmith.core.yaml import read_yaml_text
from tunesmith.evaluate import story
from tunesmith.evaluate.stage_list import holds_stages

MOST_SAMPLES = 40


def write_report(run_folder: Path | str) -> Path:
    """Writes report.html into a run folder, or one of stages, and gives its path.

    Raises:
        ConfigError: the folder does not exist or holds nothing of a run.
        DataError: a file of the run is damaged; an unfinished last line of a log is not damage.
        ResourceError: the page cannot be written.
    """
    folder = Path(run_folder)
    if holds_stages(folder):
        from tunesmith.evaluate.stages_page import write_stages_report

        return write_stages_report(folder)
    page = render_page("report.html", story.tell(read_files(folder)))
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def read_files(folder: Path) -> story.Files:
    """What a run folder holds. Raises as `write_report`."""
    if not folder.is_dir():
        raise ConfigError("no such run folder", where=str(folder))
    text = _text(folder / "config.yaml")
    records, broken = _records(folder / "metrics.jsonl")
    samples, _ = _records(folder / "samples.jsonl", MOST_SAMPLES)
    files = story.Files(
        folder=folder,
        config_text=text,
        config=_mapping(read_yaml_text(text, str(folder / "config.yaml"))) if text else {},
        records=records,
        broken_records=broken,
        samples=samples,
        rollouts=_records(folder / "rollouts.jsonl")[0],
        scores=_json(folder / "eval.json"),
        plan=_json(folder / "plan.json"),
        run=_json(folder / "run.json"),
    )
    if not any((text, records, samples, files.scores, files.plan, files.run)):
        raise ConfigError(
            "nothing of a run is here",
            where=str(folder),
            hint="a run folder holds config.yaml and metrics.jsonl; name the folder of out:",
        )
    return files


def render_page(name: str, page: dict[str, Any]) -> str:
    """A template beside this file as a page: everything escaped, one style, no script, nothing from the network."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=PackageLoader("tunesmith", "evaluate"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=in_bytes, count=in_count, time=in_time, visible=visible)
    return environment.get_template(name).render(page, style=_style(), policy=page_policy())


def page_policy() -> str:
    """The content policy of these pages: their own style by its hash, and nothing else from anywhere."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _style() -> str:
    return resources.files("tunesmith.evaluate").joinpath("report.css").read_text("utf-8")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=str(path)) from error
    except OSError as error:
        raise os_error(path, error) from error


def _json(path: Path) -> dict[str, Any]:
    return _mapping(read_json(path)) if path.exists() else {}


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _records(path: Path, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many lines were none: a killed run may leave half a line."""
    found: list[dict[str, Any]] = []
    broken = 0
    for line in _lines(path):
        try:
            record = strict_loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            broken += 1
        if most is not None and len(found) >= most:
            break
    return found, broken


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            yield from (line for line in stream if line.strip())
    except FileNotFoundError:
        return
    except OSError as error:
        raise os_error(path, error) from error
