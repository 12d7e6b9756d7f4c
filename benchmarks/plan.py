"""How right the plan is, over a grid of real runs: python benchmarks/plan.py [--folder runs/plan-grid]

Every case (`plan_cases.py`) is planned and run in a process of its own (`plan_run.py`), on one thread; one file a case,
so that what was done is not done again. `--again` plans all once more and keeps what was measured: it is how a change
of the planner is judged. Prints a table and writes table.md and table.json into the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plan_cases import cases, config_of

ROOT = Path(__file__).resolve().parents[1]
WITHIN, RESIDENT_WITHIN = 0.05, 0.10


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/plan-grid"))
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--fitted", action="store_true", help="the runs that are fitted on instead")
    parser.add_argument("--again", action="store_true", help="plan again what was run, and run nothing")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = [name for name in cases(options.fitted) if options.only in name]
    for name in names:
        if not options.again:
            run(name, options.folder)
    found = [json.loads(path.read_text()) for name in names if (path := options.folder / f"{name}.json").exists()]
    if options.again:
        plan_again(found, options.folder)
    rows = [judged(one) for one in found]
    text = "\n".join([*table(rows), "", *summary(rows)])
    (options.folder / "table.md").write_text(text + "\n")
    (options.folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


def run(name: str, folder: Path) -> None:
    """One case in a process of its own; nothing where it was run before."""
    if (folder / f"{name}.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks/plan_run.py"), name, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (folder / f"{name}.log").write_text(done.stderr)
    told = "done" if done.returncode == 0 else f"FAILED: {done.stderr.strip().splitlines()[-1][:200]}"
    print(f"{name}: {told}", file=sys.stderr, flush=True)


def plan_again(found: list[dict[str, Any]], folder: Path) -> None:
    """Puts what the planner says now in the place of what it said."""
    from tunesmith.config import build_config
    from tunesmith.plan.calibration import Calibration
    from tunesmith.run.planning import plan_run
    from tunesmith.run.prepare import prepare

    for one in found:
        calibration = Calibration(**one["calibration"]) if "calibration" in one else None
        prepared = prepare(build_config(config_of(one["case"], folder)))
        one["planned"] = plan_run(prepared, calibration=calibration).as_dict()
        (folder / f"{one['case']}.json").write_text(json.dumps(one, indent=1) + "\n")


def judged(one: dict[str, Any]) -> dict[str, Any]:
    """Planned beside measured, and how far the plan is off: (planned - measured) / measured."""
    planned, measured = one["planned"], one["measured"]
    memory = planned["memory"]
    resident = memory.get("resident_bytes") or memory["peak_bytes"] + memory["overhead_bytes"]
    token_seconds = sum(measured["cpu_seconds"]) / sum(measured["tokens"])
    return {
        "case": one["case"],
        "planned_bytes": memory["peak_bytes"],
        "measured_bytes": measured["peak_bytes"],
        "error": memory["peak_bytes"] / measured["peak_bytes"] - 1,
        "planned_resident_bytes": resident,
        "resident_bytes": measured["resident_bytes"],
        "resident_error": resident / measured["resident_bytes"] - 1,
        "planned_seconds": planned["seconds"] / planned["tokens"],
        "cpu_seconds": token_seconds,
        "time_error": planned["seconds"] / planned["tokens"] / token_seconds - 1,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a case, as Markdown."""
    three = "planned | measured | off |"
    head = f"| case | tensors: {three} resident: {three} ms a token: {three}"
    lines = [head, "|---" + "|---:" * 9 + "|"]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['planned_bytes'] / 1e6:,.0f} MB | {row['measured_bytes'] / 1e6:,.0f} MB "
            f"| {100 * row['error']:+.1f} % | {row['planned_resident_bytes'] / 1e6:,.0f} MB "
            f"| {row['resident_bytes'] / 1e6:,.0f} MB | {100 * row['resident_error']:+.1f} % "
            f"| {1000 * row['planned_seconds']:.2f} | {1000 * row['cpu_seconds']:.2f} "
            f"| {100 * row['time_error']:+.0f} % |"
        )
    return lines


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How many are right, in words."""
    count = len(rows)

    def told(key: str, within: float) -> str:
        errors = [row[key] for row in rows]
        right = sum(abs(error) <= within for error in errors)
        return (
            f"within {within:.0%}: {right} of {count} ({right / count:.0%}), "
            f"off by {100 * min(errors):+.1f} % to {100 * max(errors):+.1f} %"
        )

    typical = 100 * median(abs(row["time_error"]) for row in rows)
    return [
        f"{count} runs; peak of tensors {told('error', WITHIN)}",
        f"resident memory {told('resident_error', RESIDENT_WITHIN)}",
        f"time: off by {typical:.0f} % in the median, against processor time",
    ]


if __name__ == "__main__":
    main()
