"""The formats of answers that were compared or judged: `preference`, `ranking`, `unpaired`.

The one idea: a row is what all its answers have in common and, for each, the turns that follow. Prompts and answers
are texts or lists of turns; whole dialogues, as HH-RLHF has them, share the turns that they begin with.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.data.conversations import check_order, turns_of
from tunesmith.data.lines import describe
from tunesmith.data.rows import Compared, Message
from tunesmith.data.take import text

Turns = tuple[Message, ...]
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def preference(data: dict[str, Any]) -> Compared:
    """`chosen` and `rejected`, with their prompt as `prompt`, `conversations` or `messages`, or as whole dialogues.

    Raises DataError without a place.
    """
    key = next((key for key in ("prompt", "conversations", "messages") if data.get(key) is not None), None)
    answers = [_answer(data[name], name, whole=key is None) for name in ("chosen", "rejected")]
    prompt = () if key is None else _prompt(data[key], key)
    return _compared(_with_system(data, prompt), answers, (0, 1))


def ranking(data: dict[str, Any]) -> Compared:
    """`answers` with a number each in `ranks`: lower is better, equal is a tie. Raises DataError without a place."""
    answers, ranks = data["answers"], data["ranks"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError(f"the key 'answers' holds {describe(answers)}; a list of two answers or more is needed")
    numbers = isinstance(ranks, list) and all(
        isinstance(rank, int | float) and not isinstance(rank, bool) for rank in ranks
    )
    if not numbers or len(ranks) != len(answers):
        told = f"a list of {len(answers)} numbers is needed, one for each answer"
        raise DataError(f"the key 'ranks' holds {describe(ranks)}; {told}")
    order = sorted(range(len(ranks)), key=lambda place: ranks[place])
    levels = sorted(set(ranks))
    found = [_answer(answers[place], f"answers[{place}]") for place in order]
    placed = tuple(levels.index(ranks[place]) for place in order)
    return _compared(_with_system(data, _prompt(data["prompt"], "prompt")), found, placed)


def unpaired(data: dict[str, Any]) -> Compared:
    """One answer that is good (`label` true or 1) or bad (false or 0): `prompt` and `completion`, or `messages`.

    Raises DataError without a place.
    """
    label = data["label"]
    if label not in (0, 1):  # true and false are 1 and 0
        raise DataError(f"the key 'label' holds {describe(label)}; true (good) or false (bad) is needed")
    ranks = (0 if label else 1,)
    if data.get("messages") is not None:
        return _compared(_with_system(data, ()), [turns_of(data["messages"], "messages")], ranks)
    missing = [key for key in ("prompt", "completion") if data.get(key) is None]
    if missing:
        raise DataError(f"beside 'label' a row has 'prompt' and 'completion', or 'messages'; {missing[0]!r} is missing")
    prompt = _with_system(data, _prompt(data["prompt"], "prompt"))
    return _compared(prompt, [_answer(data["completion"], "completion")], ranks)


def _compared(prompt: Turns, answers: list[Turns], ranks: tuple[int, ...]) -> Compared:
    # some lists begin with the prompt that stands beside them
    answers = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
    shared = [turns[0] for turns in takewhile(lambda turns: len(set(turns)) == 1, zip(*answers, strict=False))]
    # an answer keeps its last turn, be it the same in all
    count = min(len(shared), *(len(answer) - 1 for answer in answers), len(answers[0]) - 1)
    prompt, answers = (*prompt, *shared[:count]), [answer[count:] for answer in answers]
    if not prompt:
        raise DataError("the answers have no prompt in common")
    for answer in answers:
        check_order([*prompt, *answer])
    return Compared(prompt, tuple(answers), ranks)


def _prompt(value: Any, key: str) -> Turns:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"the key {key!r} holds an empty text")
        return (Message("user", value),)
    return turns_of(value, key)


def _answer(value: Any, key: str, whole: bool = False) -> Turns:
    """The turns of an answer, or with `whole` of a dialogue that ends with it."""
    if isinstance(value, dict):  # one turn
        value = [value]
    if not isinstance(value, str):
        return turns_of(value, key)
    if not value.strip():
        raise DataError(f"the key {key!r} holds an empty text; there is nothing to compare")
    return _spoken(value, key) if whole else (Message("assistant", value, supervised=True),)


def _spoken(dialogue: str, key: str) -> Turns:
    """The turns of `\\n\\nHuman: ...\\n\\nAssistant: ...`; turns of one side in a row are one."""
    before, *parts = _SPEAKER.split(dialogue)
    if before.strip() or not parts:
        told = "without a key 'prompt', a dialogue 'Human: ... Assistant: ...' or a list of turns is needed"
        raise DataError(f"the key {key!r} holds a plain text; {told}")
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = "user" if speaker == "Human" else "assistant", said.strip()
        if turns and turns[-1].role == role:
            said = f"{turns.pop().content}\n\n{said}".strip()
        turns.append(Message(role, said, supervised=role == "assistant"))
    if not turns[-1].content:
        raise DataError(f"the key {key!r} ends with an empty answer; there is nothing to compare")
    return tuple(turns)


def _with_system(data: dict[str, Any], prompt: Turns) -> Turns:
    system = text(data, "system", optional=True)
    if not system:
        return prompt
    if prompt and prompt[0].role == "system":
        return (Message("system", f"{prompt[0].content}\n\n{system}"), *prompt[1:])
    return (Message("system", system), *prompt)
