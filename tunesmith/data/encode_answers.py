"""Rows with answers to compare as token ids: a document for each answer, all behind the very same prompt.

The one idea: answers are whole and equally informed. What a row is too long by is cut off the start of its prompt,
for all answers alike; where an answer does not fit, the row is left out whole. A document ends with its answer's end
token: there a score is read.
"""

from __future__ import annotations

from tunesmith.core.errors import DataError
from tunesmith.core.problem import Comparison
from tunesmith.data.codec import Codec
from tunesmith.data.encode import TOO_LONG, Dropped, Example
from tunesmith.data.labels import framed
from tunesmith.data.rows import Compared, Dialogue, Row
from tunesmith.data.templates import Template, render

SAME, TIED = "the answers are the same", "neither answer is better"
_KEYS = "rows are {prompt, chosen, rejected} or {prompt, answers, ranks}; see data.format"


def encode_compared(
    row: Row, template: Template | None, codec: Codec, max_length: int, wanted: Comparison
) -> Example | Dropped:
    """One row as documents of at most `max_length` tokens each.

    Args:
        template: of a model that writes; None frames prompt and answer as two texts, as encoders read them.
        wanted: which answers rows have.

    Raises DataError for a row that is not as wanted.
    """
    if not isinstance(row, Compared):
        raise DataError("there are no answers to compare in this row", where=row.where, hint=_KEYS)
    _check(row, wanted)
    if wanted == "pairs" and len(set(row.ranks)) == 1:
        return Dropped(TIED, row.where)
    parts = _framed(row, codec, max_length) if template is None else _written(row, template, codec, max_length)
    if isinstance(parts, str):
        return Dropped(parts, row.where)
    if len(parts) > 1 and all(part.ids == parts[0].ids for part in parts):
        return Dropped(SAME, row.where)
    return Example(
        [token for part in parts for token in part.ids],
        [learnt for part in parts for learnt in part.supervised],
        row.where,
        sum(part.truncated_tokens for part in parts),
        parts[0].escaped,
        types=tuple(kind for part in parts for kind in part.types),
        lengths=tuple(len(part.ids) for part in parts),
        ranks=row.ranks,
    )


def _check(row: Compared, wanted: Comparison) -> None:
    count = len(row.answers)
    if count == 1 and wanted != "judged":
        hint = "objective: {kind: dpo, loss: kto} learns from single answers that are good or bad"
        raise DataError("one answer has no other to be compared with", where=row.where, hint=hint)
    if count > 2 and wanted != "rankings":
        hint = "objective: reward and {kind: dpo, loss: sigmoid} learn from rankings"
        raise DataError(f"{count} ranked answers, where two are to be compared", where=row.where, hint=hint)


def _written(row: Compared, template: Template, codec: Codec, max_length: int) -> list[Example] | str:
    """The documents of a model that writes: the rendered dialogue up to the end token of its answer."""
    parts = [_document(dialogue, template, codec) for dialogue in row.dialogues]
    over = max(0, *(len(part.ids) - max_length for part in parts))
    keep = 1 if parts[0].ids[:1] == [codec.bos] else 0
    if over > min(part.supervised.index(True) for part in parts) - keep - 1:
        return TOO_LONG  # at least a token of the prompt stays
    if not over:
        return parts
    return [
        Example(
            part.ids[:keep] + part.ids[keep + over :], part.supervised[over:], part.where, over, part.escaped
        )
        for part in parts
    ]  # fmt: skip


def _document(dialogue: Dialogue, template: Template, codec: Codec) -> Example:
    rendered = render(dialogue, template)
    ids, learnt = codec.encode(rendered)
    end = len(learnt) - learnt[::-1].index(True)
    return Example(ids[:end], learnt[:end], dialogue.where, 0, len(rendered.protected))


def _framed(row: Compared, codec: Codec, max_length: int) -> list[Example] | str:
    """The documents of an encoder: the turns before the answer and the answer, framed as a pair of texts."""
    texts = [("\n\n".join(turn.text for turn in dialogue.prompt), dialogue.completion) for dialogue in row.dialogues]
    pairs = [(codec.pieces(prompt), codec.pieces(answer)) for prompt, answer in texts]
    room = max_length - codec.frame_tokens(pair=True)
    over = max(0, *(len(first) + len(second) - room for first, second in pairs))
    if over >= min(len(first) for first, _ in pairs):
        return TOO_LONG
    parts = []
    for first, second in pairs:
        first.truncate(len(first) - over, direction="left")
        ids, types, _ = framed(codec, first, second)
        parts.append(Example(ids, [False] * len(ids), row.where, over, types=types or (0,) * len(ids)))
    return parts
