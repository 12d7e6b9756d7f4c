"""The options of a benchmark that trains the same with several seeds, each with a default of its own.

What such a benchmark compares, and what it prints, is in its own file.
"""

from __future__ import annotations

import argparse


def over_seeds(
    description: str | None, *, model: str, steps: int, rows: int, judged: int, lr: float
) -> argparse.ArgumentParser:
    """A command line that asks for a model, seeds, and how much is learnt and judged."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, help="bundled name, or folder")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=steps, help="updates of a run")
    parser.add_argument("--rows", type=int, default=rows, help="of an update")
    parser.add_argument("--judged", type=int, default=judged, help="rows that are not learnt")
    parser.add_argument("--lr", type=float, default=lr)
    return parser
