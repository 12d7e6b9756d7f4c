"""The prompts that are asked: the questions of any rows, whether or not these have answers.

A row with answers gives its conversation before the last one; a row {prompt} gives its text.
"""

from __future__ import annotations

from itertools import islice

from tunesmith.compare.store import Messages
from tunesmith.core.errors import DataError
from tunesmith.data.formats import convert, fits
from tunesmith.data.lines import RawRow
from tunesmith.data.rows import Dialogue, Labelled, Text
from tunesmith.data.sources import open_source


def read_prompts(source: str, rows: int | None = None) -> list[Messages]:
    """The prompts of a bundled set, file or hub id, each once. Raises DataError, ResourceError."""
    opened = open_source(source)
    found = [_prompt(opened[place]) for place in islice(range(len(opened)), rows)]
    return list({str(messages): messages for messages in found}.values())


def _prompt(row: RawRow) -> Messages:
    data = row.data
    prompt = data.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    name = fits(data)
    converted = convert(data, name, row.where) if name else None
    if isinstance(converted, Labelled):
        converted = converted.dialogue()
    if isinstance(converted, Dialogue):
        return [
            {"role": one.role, "content": one.content, **({"context": one.context} if one.context else {})}
            for one in converted.prompt
        ]
    if isinstance(converted, Text):
        return [{"role": "user", "content": converted.text}]
    hint = "a row has the key prompt, or is of a format that `tunesmith check` takes"
    raise DataError(f"the keys ({', '.join(data) or 'none'}) hold no prompt", where=row.where, hint=hint)
