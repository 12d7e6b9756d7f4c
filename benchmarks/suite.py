"""All cells of `sft.py` beside their targets: python benchmarks/sft.py --suite [--cells NAME,...] [--steps 18]

A cell is one comparison, kept as CELL.json in a folder of model and threads under `--out`; what is there is not run
again, so a stopped suite goes on where it was. The table is printed from what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sft import compared
from benchmarks.workers import described, say, told

# what differs from the defaults of sft.py, by name
CELLS: dict[str, dict[str, Any]] = {
    "lora-mixed-bf16": {},
    "lora-mixed-fp32": {"precision": "fp32"},
    "lora-mixed-bf16-prefix": {"prefix": 200},
    "full-mixed-bf16": {"task": "full"},
    "lora-short-bf16": {"lengths": "short"},
    "lora-long-bf16": {"lengths": "long"},
    "lora-qv-mixed-bf16": {"task": "lora-qv"},
    "full-mixed-fp32": {"task": "full", "precision": "fp32"},
    "full-short-bf16": {"task": "full", "lengths": "short"},
    "full-long-bf16": {"task": "full", "lengths": "long"},
    "lora-short-fp32": {"lengths": "short", "precision": "fp32"},
    "lora-long-fp32": {"lengths": "long", "precision": "fp32"},
    "lora-qv-mixed-fp32": {"task": "lora-qv", "precision": "fp32"},
}


@dataclass(frozen=True)
class Target:
    """A number that a cell is to reach.

    Attributes:
        what: for people.
        cell: where it is read.
        read: of the cell's document.
        bound: to be reached from below, or from above where `most`.
    """

    what: str
    cell: str
    read: Callable[[dict[str, Any]], float | None]
    bound: float
    most: bool = False

    def line(self, found: dict[str, Any] | None) -> str:
        """A row of the table."""
        sign = "at most" if self.most else "at least"
        value = self.read(found) if found else None
        if value is None:
            return f"| {self.what} | `{self.cell}` | {sign} {self.bound:g} | not measured | |"
        met = value <= self.bound if self.most else value >= self.bound
        return f"| {self.what} | `{self.cell}` | {sign} {self.bound:g} | {value:.2f} | {'met' if met else 'missed'} |"


def _key(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda found: found[name]


def _of_defaults(cell: dict[str, Any]) -> float | None:
    return cell["defaults"]["speed_ratio"] if cell["defaults"] else None


TARGETS = (
    Target("LoRA, tokens/s, trl's best", "lora-mixed-bf16", _key("speed_ratio"), 3.0),
    Target("LoRA, peak memory, trl's best", "lora-mixed-bf16", _key("memory_ratio"), 0.35, most=True),
    Target("LoRA, peak of tensors, trl's best", "lora-mixed-bf16", _key("tensor_ratio"), 0.35, most=True),
    Target("LoRA, tokens/s, trl's defaults", "lora-mixed-bf16", _of_defaults, 7.0),
    Target("LoRA in fp32, tokens/s", "lora-mixed-fp32", _key("speed_ratio"), 2.0),
    Target("LoRA, 200 tokens shared, tokens/s", "lora-mixed-bf16-prefix", _key("speed_ratio"), 5.0),
    Target("full tuning, tokens/s, trl's best", "full-mixed-bf16", _key("speed_ratio"), 1.8),
    Target("full tuning, peak memory, trl's best", "full-mixed-bf16", _key("memory_ratio"), 0.7, most=True),
    Target("full tuning, peak of tensors", "full-mixed-bf16", _key("tensor_ratio"), 0.7, most=True),
    Target("share of the matmul ceiling", "lora-mixed-bf16", _key("share_of_ceiling"), 0.68),
)


def main(options: argparse.Namespace) -> None:
    """Runs what is missing and prints the table."""
    folder = Path(options.out) / f"{Path(options.model).name}-{options.threads}t"
    folder.mkdir(parents=True, exist_ok=True)
    same_settings(folder, options)
    wanted = [name.strip() for name in options.cells.split(",") if name.strip()] or list(CELLS)
    for name in wanted:
        path = folder / f"{name}.json"
        if not path.exists():
            say(f"cell {name}")
            result = compared(with_cell(options, name))
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1))
            part.replace(path)
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in CELLS if _is_there(folder, name)}
    print(json.dumps(found, indent=1) if options.json else table(found))


def same_settings(folder: Path, options: argparse.Namespace) -> None:
    """Raises SystemExit where the folder holds cells of other settings."""
    aside = ("cells", "out", "json", "suite", "threads")
    kept = {key: value for key, value in vars(options).items() if key not in aside}
    known = folder / "settings.txt"
    if known.exists() and json.loads(known.read_text()) != kept:
        raise SystemExit(f"{folder} holds cells of other settings; give another --out")
    known.write_text(json.dumps(kept))


def with_cell(options: argparse.Namespace, name: str) -> argparse.Namespace:
    """The options of one cell."""
    if name not in CELLS:
        raise SystemExit(f"no cell {name}; there are {', '.join(CELLS)}")
    mine = copy(options)
    vars(mine).update(CELLS[name])
    return mine


def table(found: dict[str, dict[str, Any]]) -> str:
    """All cells, and the targets, in Markdown."""
    lines = [described(next(iter(found.values()))["runs"]["machine"]), ""] if found else []
    lines += [
        "| cell | supervised tokens/s | trl's best | times | by CPU seconds | times its defaults | peak memory "
        "| of tensors | share of ceiling | losses differ by |",
        "|" + "---|" * 10,
    ]
    for name, cell in found.items():
        runs = cell["runs"]
        rival = runs["turns"][runs["best"]]
        defaults = told(cell["defaults"]["speed"]) if cell["defaults"] else ""
        tensors = "" if cell["tensor_ratio"] is None else f"{cell['tensor_ratio']:.2f}"
        lines.append(
            f"| `{name}` | {runs['turns']['tunesmith']['supervised_tokens_per_second']:.0f} "
            f"| {rival['supervised_tokens_per_second']:.0f} ({runs['best']}) | {told(cell['speed'])} "
            f"| {told(rival['cpu'])} | {defaults} | {cell['memory_ratio']:.2f} | {tensors} "
            f"| {100 * cell['share_of_ceiling']:.0f} % | {cell['loss_gap']:.1e} |"
        )
    lines += ["", "| target | cell | | measured | |", "|---|---|---|---|---|"]
    return "\n".join(lines + [target.line(found.get(target.cell)) for target in TARGETS])


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()
