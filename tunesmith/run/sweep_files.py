"""The files of a sweep, made from its trials' own: sweep.json, table.md, sweep.html."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.files import canonical_json, write_atomic
from tunesmith.evaluate.sweep_page import sweep_page
from tunesmith.evaluate.sweep_rows import base_row, rank_table, sort_rows, sweep_row
from tunesmith.evaluate.sweep_table import sweep_markdown
from tunesmith.run.folder import machine, versions
from tunesmith.run.judging import CONSTANT
from tunesmith.run.spaces import Setting
from tunesmith.run.sweep import Sweep

NOT_YET = {"status": "waiting"}


def write_sweep(sweep: Sweep, settings: Sequence[Setting], failed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Writes the files and answers sweep.json; nothing is written before the base has been judged.

    Args:
        settings: the rows.
        failed: facts of trials that left none.
    """
    base_facts = sweep.base.facts
    if base_facts is None or base_facts["status"] != "finished":
        return {}
    # a head that has not been trained says what chance says, which is nothing to gain over
    answers = ("untuned",) if sweep.prepared.problem is None else (CONSTANT,)
    base = base_row(base_facts, sweep.metric, answers)
    by_name: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in settings}
    for trial in sweep.trials(settings):
        facts = trial.facts or failed.get(trial.folder.name) or NOT_YET
        by_name[trial.name].append({"seed": trial.seed, **facts})
    every = [trial for trials in by_name.values() for trial in trials]
    ended = sum(trial["status"] in ("finished", "failed") for trial in every)
    rows = [sweep_row(_described(sweep, one), by_name[one.name], base, sweep.metric) for one in settings]
    found = {
        "model": sweep.config.model,
        "budget": sweep.order.wanted.budget,
        "within": sweep.order.wanted.within,
        "seeds": sweep.order.seeds,
        "steps": sweep.prepared.totals.steps,
        "rows_per_step": sweep.rows_per_step,
        "metric": sweep.metric,
        "general": sweep.order.forgetting if base["general_loss"] is not None else None,
        "partial": ended < len(every),
        "finished": ended,
        "trials": len(every),
        "head_parameters": sweep.head_parameters,
        "base": base,
        "rows": sort_rows(rows, sweep.metric),
        "rank_tables": rank_table(rows, sweep.metric),
        "left_out": sweep.choice.left_out,
        "data": {"train": sweep.prepared.train.describe(), "eval": sweep.prepared.eval.describe()},  # type: ignore[union-attr]
        "machine": machine(),
        "versions": versions(),
    }
    folder = sweep.folder
    write_atomic(folder / "sweep.json", canonical_json(found, indent=1) + "\n")
    write_atomic(folder / "table.md", sweep_markdown(found))
    write_atomic(folder / "sweep.html", sweep_page(found))
    return found


def drop_checkpoints(folder: Path) -> None:
    """Checkpoints of a finished trial are of no use, and of many trials they fill a disk."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _described(sweep: Sweep, setting: Setting) -> dict[str, Any]:
    return {
        "name": setting.name,
        "kind": setting.method.kind,
        "why": setting.why,
        "method": setting.method.model_dump(mode="json"),
        "parameters": setting.parameters,
        "lr": sweep.lr(setting),
        "note": setting.note,
        "planned_bytes": sweep.plans[setting.name]["memory"]["peak_bytes"],
    }
