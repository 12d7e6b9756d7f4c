"""Short word problems whose answer is a calculation: python scripts/word_problems.py FOLDER

Each asks for a sum, a difference or a product and is answered with it, as " 14 + 7 = 21". Rows come from a seed alone;
no two have the same prompt: 100 rows in sft.jsonl, 6,000 in prompts.jsonl, 500 in test.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kate", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers")
STORIES = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} are there now?",
        "There are {a} {things} on the table and {b} in the box. How many {things} are there in all?",
        "{name} found {a} {things} today and {b} yesterday. How many {things} is that together?",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} away. How many {things} are left?",
        "Of {a} {things} in the box, {b} are lost. How many {things} remain?",
        "{name} has {a} {things}, a friend has {b}. How many more {things} does {name} have?",
    ),
    "*": (
        "{name} has {a} bags with {b} {things} each. How many {things} are there in all?",
        "There are {a} shelves, and on each are {b} {things}. How many {things} is that?",
        "{name} buys {a} {things} a day for {b} days. How many {things} is that?",
    ),
}


def problem(draw: random.Random) -> dict[str, str]:
    """One row."""
    sign = draw.choice("+-*")
    a, b = (draw.randint(2, 9), draw.randint(2, 9)) if sign == "*" else (draw.randint(2, 20), draw.randint(2, 20))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    found = {"+": a + b, "-": a - b, "*": a * b}[sign]
    story = draw.choice(STORIES[sign]).format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b)
    return {"prompt": f"{story}\nAnswer:", "completion": f" {a} {sign} {b} = {found}"}


def main(folder: str) -> None:
    """Writes the three files."""
    draw, rows = random.Random(0), {}
    while len(rows) < 6600:
        row = problem(draw)
        rows.setdefault(row["prompt"], row)
    every = list(rows.values())
    for name, part in (("sft", every[:100]), ("prompts", every[100:6100]), ("test", every[6100:])):
        (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
