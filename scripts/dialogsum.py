"""Writes DialogSum rows as conversations: python scripts/dialogsum.py IN.jsonl OUT.jsonl [FIRST:LAST]"""

import json
import sys

QUESTION = "Summarize this dialogue in one or two sentences.\n\n{dialogue}"


def main(source: str, target: str, rows: str = ":") -> None:
    """Converts the lines FIRST to LAST of a file."""
    first, _, last = rows.partition(":")
    with open(source, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines][int(first or 0) : int(last) if last else None]
    with open(target, "w", encoding="utf-8") as stream:
        for row in found:
            messages = [
                {"role": "user", "content": QUESTION.format(dialogue=row["dialogue"])},
                {"role": "assistant", "content": row["summary"]},
            ]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
