"""The page of a list of stages: what each came to, in their order, with its own report behind a link.

Whether a folder is one says `stage_list`; what a stage's figures mean is `story`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.files import write_atomic
from tunesmith.evaluate import story
from tunesmith.evaluate.report import read_files, render_page, write_report
from tunesmith.evaluate.stage_list import names_in


def write_stages_report(folder: Path) -> Path:
    """Writes report.html of all stages, and of each that was begun; gives the path of the first. Raises as a report."""
    page = {"title": folder.resolve().name, "stages": [_stage(folder / name) for name in names_in(folder)]}
    path = folder / "report.html"
    write_atomic(path, render_page("stages.html", page))
    return path


def _stage(folder: Path) -> dict[str, Any]:
    if not (folder / "config.yaml").exists():
        return {"name": folder.name, "begun": False}
    report = write_report(folder)
    told = story.tell(read_files(folder))
    shown = ("status", "status_kind", "headline", "tiles", "tables", "charts")
    return {"name": folder.name, "begun": True, "link": f"{folder.name}/{report.name}", **{k: told[k] for k in shown}}
