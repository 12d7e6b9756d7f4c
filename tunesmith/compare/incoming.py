"""Rows of comparisons that others have made: HH-RLHF pairs, preference and ranking rows, Argilla, Label Studio.

The one idea: a row becomes a prompt, its answers and what people said of them; the kind of a row is known by its keys.
Systems are called after the keys that held their answers, unless the row says who wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from tunesmith.compare.store import IMPORTED, Messages
from tunesmith.core.errors import DataError
from tunesmith.core.files import strict_loads
from tunesmith.data.lines import describe

_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Said:
    """A judgement in a row: by whom, and the rank of each answer."""

    annotator: str
    ranks: list[int]
    seconds: float = 0.0


@dataclass(frozen=True)
class Incoming:
    """A row: the conversation, its answers with who wrote each, what was said of them."""

    messages: Messages
    answers: list[tuple[str, str]]
    said: list[Said] = field(default_factory=list)


def incoming(data: dict[str, Any], where: str) -> Incoming:
    """A row of any of these kinds. Raises DataError."""
    try:
        convert = next((convert for keys, convert in _KINDS if all(data.get(key) is not None for key in keys)), None)
        if convert is None:
            hint = "keys are chosen and rejected, prompt and answers, fields (Argilla), or data (Label Studio)"
            raise DataError(f"the keys ({', '.join(data) or 'none'}) are of no kind of comparison", hint=hint)
        row = convert(data)
        if len(row.answers) < 2:
            raise DataError(f"there are {len(row.answers)} answers; a comparison has two or more")
        for one in row.said:
            if len(one.ranks) != len(row.answers):
                raise DataError(f"there are {len(row.answers)} answers and {len(one.ranks)} ranks")
        return replace(row, said=[replace(one, ranks=_dense(one.ranks)) for one in row.said])
    except DataError as error:
        raise DataError(error.message, where=where, hint=error.hint) from error


def _preference(data: dict[str, Any]) -> Incoming:
    """{prompt, chosen, rejected}: texts, or lists of messages."""
    prompt = _messages(data["prompt"], "prompt")
    texts = [_answer(data[key], key) for key in ("chosen", "rejected")]
    return Incoming(prompt, [("chosen", texts[0]), ("rejected", texts[1])], [Said(IMPORTED, [1, 2])])


def _sharegpt(data: dict[str, Any]) -> Incoming:
    """{conversations, chosen, rejected}: turns as {from, value}."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

    def turns(listed: Any, key: str) -> Messages:
        pairs = [(one.get("from"), one.get("value")) if isinstance(one, dict) else (None, None) for one in listed]
        return _messages([{"role": roles.get(str(who), who), "content": said} for who, said in pairs], key)

    listed = data["conversations"] if isinstance(data["conversations"], list) else []
    answers = [(key, turns([data[key]], key)[0]["content"]) for key in ("chosen", "rejected")]
    return Incoming(turns(listed, "conversations"), answers, [Said(IMPORTED, [1, 2])])


def _pair(data: dict[str, Any]) -> Incoming:
    """{chosen, rejected}, each a whole conversation, as HH-RLHF has them (Bai et al. 2022, arXiv 2204.05862).

    Five of the 2,312 harmless test rows part before the last answer: there, an answer is all that follows.
    """
    turns = [_transcript(data[key], key) for key in ("chosen", "rejected")]
    same = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(*turns, strict=False))]
    while same and same[-1]["role"] != "user":
        same.pop()
    chosen, rejected = (_rest(one[len(same) :]) for one in turns)
    if not same or any(len(one) == len(same) for one in turns):
        raise DataError("chosen and rejected are not one conversation that goes on in two ways")
    return Incoming(same, [("chosen", chosen), ("rejected", rejected)], [Said(IMPORTED, [1, 2])])


def _rest(turns: Messages) -> str:
    """What follows a prompt: an answer, and where a conversation goes on, whose turn each is."""
    names = {"user": "Human: ", "assistant": "Assistant: "}
    later = [names.get(one["role"], "") + one["content"] for one in turns[1:]]
    return "\n\n".join([one["content"] for one in turns[:1]] + later)


def _ranking(data: dict[str, Any]) -> Incoming:
    """{prompt, answers[, ranks][, systems]}; without ranks the row is to be judged."""
    answers = data["answers"]
    if not isinstance(answers, list):
        raise DataError(f"the key 'answers' holds {describe(answers)}; a list is needed")
    texts = [_answer(one, "answers") for one in answers]
    systems = data.get("systems") or ["unnamed"] * len(texts)
    if not isinstance(systems, list) or len(systems) != len(texts) or not all(isinstance(one, str) for one in systems):
        raise DataError(f"the key 'systems' holds {describe(systems)}; a name for each answer is needed")
    ranks = data.get("ranks")
    if ranks is not None and (not isinstance(ranks, list) or not all(type(one) is int for one in ranks)):
        raise DataError(f"the key 'ranks' holds {describe(ranks)}; a whole number for each answer is needed")
    said = [] if ranks is None else [Said(IMPORTED, ranks)]
    return Incoming(_messages(data["prompt"], "prompt"), list(zip(systems, texts, strict=True)), said)


def _argilla(data: dict[str, Any]) -> Incoming:
    """A record as Argilla exports it: `fields`, and `responses` by question (2.x) or by user (1.x)."""
    fields = data["fields"]
    if not isinstance(fields, dict):
        raise DataError(f"the key 'fields' holds {describe(fields)}; an object is needed")
    names = [name for name in fields if re.search(r"\d+$|^(chosen|rejected)$|[-_ ][a-z]$", name, re.I)]
    prompt = next((fields[name] for name in ("prompt", "instruction", "question", "input") if name in fields), None)
    if prompt is None:
        raise DataError(f"none of the fields ({', '.join(fields)}) is prompt, instruction, question or input")
    said = []
    for user, value in _argilla_responses(data.get("responses") or {}):
        places = _argilla_places(value)
        if places and set(places) <= set(names):
            unplaced = max(places.values()) + 1
            said.append(Said(user, [places.get(name, unplaced) for name in names]))
    return Incoming(_messages(prompt, "prompt"), [(name, _answer(fields[name], name)) for name in names], said)


def _argilla_responses(responses: Any) -> list[tuple[str, Any]]:
    """(user, value of a question) of every response that was submitted."""
    found = []
    if isinstance(responses, dict):
        for values in responses.values():
            for one in values if isinstance(values, list) else []:
                if isinstance(one, dict) and one.get("status", "submitted") == "submitted":
                    found.append((str(one.get("user_id") or IMPORTED), one.get("value")))
    for one in responses if isinstance(responses, list) else []:
        if isinstance(one, dict) and one.get("status", "submitted") == "submitted":
            values = one.get("values") or {}
            found += [(str(one.get("user_id") or IMPORTED), (value or {}).get("value")) for value in values.values()]
    return found


def _argilla_places(value: Any) -> dict[str, int]:
    """Field -> rank of an answer to a question: a ranking, or the one label that was chosen."""
    if isinstance(value, str):
        return {value: 1}
    places: dict[str, int] = {}
    for number, one in enumerate(value if isinstance(value, list) else [], start=1):
        if isinstance(one, str):
            places[one] = number
        elif isinstance(one, dict) and isinstance(one.get("value"), str) and type(one.get("rank")) is int:
            places[one["value"]] = one["rank"]
    return places


def _label_studio(data: dict[str, Any]) -> Incoming:
    """A task as Label Studio exports it: `data`, and `annotations` made with its tags Pairwise or Ranker."""
    task = data["data"]
    if not isinstance(task, dict):
        raise DataError(f"the key 'data' holds {describe(task)}; an object is needed")
    if isinstance(task.get("items"), list):
        items = [one for one in task["items"] if isinstance(one, dict)]
        answers = [(str(one.get("id")), _answer(one.get("body") or one.get("html"), "items")) for one in items]
    else:
        names = [name for name in task if re.search(r"\d+$", name) and isinstance(task[name], str)]
        answers = [(name, task[name]) for name in names]
    prompt = next((task[name] for name in ("prompt", "question", "instruction", "text") if task.get(name)), None)
    if prompt is None:
        raise DataError(f"none of {', '.join(task)} is prompt, question, instruction or text")
    said = []
    for made in data.get("annotations") or []:
        ranks = (
            None
            if made.get("was_cancelled")
            else _label_studio_ranks(made.get("result"), [name for name, _ in answers])
        )
        if ranks is not None:
            by = made.get("completed_by")
            person = by.get("email") or by.get("id") if isinstance(by, dict) else by
            said.append(Said(str(person or IMPORTED), ranks, float(made.get("lead_time") or 0.0)))
    return Incoming(_messages(prompt, "prompt"), answers, said)


def _label_studio_ranks(result: Any, names: list[str]) -> list[int] | None:
    for one in result if isinstance(result, list) else []:
        value = one.get("value") or {}
        if one.get("type") == "pairwise" and len(names) == 2:
            return {"left": [1, 2], "right": [2, 1]}.get(str(value.get("selected")), [1, 1])
        order = value.get("ranker")
        if isinstance(order, dict):  # buckets: `_` holds what was never sorted; a single other one is a ranking
            sorted_ = [found for name, found in order.items() if name != "_" and found]
            order = sorted_[0] if len(sorted_) == 1 else None
        if isinstance(order, list) and set(order) <= set(names) and order:
            return [order.index(name) + 1 if name in order else len(order) + 1 for name in names]
    return None


_KINDS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Incoming]], ...] = (
    (("conversations", "chosen", "rejected"), _sharegpt),
    (("prompt", "chosen", "rejected"), _preference),
    (("chosen", "rejected"), _pair),
    (("prompt", "answers"), _ranking),
    (("fields",), _argilla),
    (("data",), _label_studio),
)


def _transcript(value: Any, key: str) -> Messages:
    """A conversation as a list of messages, or as HH-RLHF writes it."""
    if isinstance(value, list):
        return _messages(value, key)
    if not isinstance(value, str):
        raise DataError(f"the key {key!r} holds {describe(value)}; a conversation is needed")
    pieces = _TURN.split(value)
    if len(pieces) < 5 or pieces[0].strip():
        raise DataError(f"the key {key!r} is no conversation of turns that begin with Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": text.strip()} for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _messages(value: Any, key: str) -> Messages:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if (
        isinstance(value, list)
        and value
        and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in value
        )
    ):
        return [{"role": one["role"], "content": one["content"]} for one in value]
    raise DataError(f"the key {key!r} holds {describe(value)}; a text, or a list of messages, is needed")


def _answer(value: Any, key: str) -> str:
    """A text, or the last of a list of messages."""
    if isinstance(value, str) and value[:1] == "[" and '"role"' in value:
        value = strict_loads(value)
    if isinstance(value, list):
        value = _messages(value, key)[-1]["content"]
    if not isinstance(value, str):
        raise DataError(f"the key {key!r} holds {describe(value)}; text is needed")
    return value


def _dense(ranks: list[int]) -> list[int]:
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return [places[rank] for rank in ranks]
