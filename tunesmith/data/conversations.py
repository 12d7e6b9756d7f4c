"""The two formats of conversations: `messages` (OpenAI's chat format) and `sharegpt`.

Both become turns under the same rules: at most one system turn, at the beginning; no two turns of a side in a
row; the last turn is the assistant's. A function call is an assistant turn whose text is the call as JSON on one
line, what a function gave back is a tool turn, and the functions stand as JSON in the system turn.
"""

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.errors import DataError, did_you_mean
from tunesmith.core.files import strict_loads
from tunesmith.data.lines import describe
from tunesmith.data.rows import Dialogue, Message
from tunesmith.data.take import text, texts

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_KEYS = (("role", "content"), ("from", "value"))
_CALLING = (
    'You can call these functions. To call one, answer with JSON alone: {"name": its name, "arguments": '
    "{its arguments}}"
)


def messages(data: dict[str, Any]) -> Dialogue:
    """A row of the format `messages`. Raises DataError without a place."""
    return _dialogue(data, "messages", "role", "content")


def conversation(data: dict[str, Any]) -> Dialogue:
    """A row of the format `sharegpt`. Raises DataError without a place."""
    return _dialogue(data, "conversations", "from", "value")


def call_text(name: Any, arguments: Any) -> str:
    """A function call as one line of JSON. Raises DataError."""
    if isinstance(arguments, str):
        arguments = _json(arguments, "the arguments of a function call") if arguments.strip() else {}
    if not isinstance(name, str) or not name:
        raise DataError(f"a function call needs a name, not {describe(name)}")
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of a function call are {describe(arguments)}; an object is needed")
    # the spaces of json.dumps: most JSON that models have read is written so
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def turns_of(listed: Any, key: str, role_key: str = "role", content_key: str = "content") -> tuple[Message, ...]:
    """The turns of a list under a key, in either spelling, whatever their order. Raises DataError without a place."""
    if isinstance(listed, str):  # CSV and some Parquet files hold the list as text
        listed = _json(listed, f"the key {key!r}")
    if not isinstance(listed, list):
        raise DataError(f"the key {key!r} holds {describe(listed)}; a list of turns is needed")
    if not listed:
        raise DataError(f"the key {key!r} holds an empty list")
    return tuple(_turn(raw, number, role_key, content_key) for number, raw in enumerate(listed, start=1))


def _dialogue(data: dict[str, Any], key: str, role_key: str, content_key: str) -> Dialogue:
    turns = list(turns_of(data[key], key, role_key, content_key))
    turns = _with_system(turns, text(data, "system", optional=True), _tools(data.get("tools")))
    check_order(turns)
    return Dialogue(tuple(turns), references=texts(data, "references"))


def _turn(raw: Any, number: int, role_key: str, content_key: str) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"turn {number} is {describe(raw)}; an object with {role_key!r} and {content_key!r} is needed")
    if role_key not in raw:  # either list is met with the keys of the other
        role_key, content_key = next((pair for pair in _KEYS if pair[0] in raw), (role_key, content_key))
    named = raw.get(role_key)
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        shown = repr(named) if isinstance(named, str) else describe(named)
        hint = did_you_mean(named, _ROLES) if isinstance(named, str) else ""
        raise DataError(f"turn {number} has the role {shown}; roles are {' '.join(_ROLES)}", hint=hint)
    content = _content(raw, number, content_key, named == "function_call")
    if role == "assistant" and not content.strip():
        raise DataError(f"turn {number}, an answer, is empty; there is nothing to learn from it")
    return Message(role, content, supervised=role == "assistant" and raw.get("weight", 1) != 0)


def _content(raw: dict[str, Any], number: int, key: str, is_call: bool) -> str:
    value = raw.get(key)
    calls = _calls(raw)
    if isinstance(value, list):
        value = "".join(_part(part, number) for part in value)
    if value is None and calls:
        value = ""
    if not isinstance(value, str):
        raise DataError(f"turn {number}: the key {key!r} holds {describe(value)}; text is needed")
    if is_call:
        found = _json(value, f"turn {number}, a function call,")
        listed = found if isinstance(found, list) else [found]
        calls = [_call(call) for call in listed]
        value = ""
    return "\n".join([*([value] if value.strip() or not calls else []), *calls])


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else describe(part)
    raise DataError(f"turn {number} has a part of type {kind!r}; text alone is read")


def _calls(raw: dict[str, Any]) -> list[str]:
    listed = raw.get("tool_calls") or ([raw["function_call"]] if raw.get("function_call") else [])
    if not isinstance(listed, list):
        raise DataError(f"tool_calls holds {describe(listed)}; a list is needed")
    return [_call(call) for call in listed]


def _call(call: Any) -> str:
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict):
        raise DataError(f"a function call is {describe(inner)}; an object with name and arguments is needed")
    return call_text(inner.get("name"), inner.get("arguments", inner.get("parameters", {})))


def _tools(value: Any) -> str:
    if value is None or value == "":
        return ""
    listed = _json(value, "the key 'tools'") if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise DataError(f"the key 'tools' holds {describe(listed)}; a list of functions is needed")
    functions = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in listed]
    if not all(isinstance(function, dict) and "name" in function for function in functions):
        raise DataError("the key 'tools' lists something without a name")
    lines = [json.dumps(function, ensure_ascii=False) for function in functions]
    return "\n".join([_CALLING, *lines]) if lines else ""


def _json(value: str, what: str) -> Any:
    try:
        return strict_loads(value)
    except ValueError as error:
        raise DataError(f"{what} is not JSON: {error}") from error


def _with_system(turns: list[Message], *texts_: str) -> list[Message]:
    first = [turns[0].content] if turns[0].role == "system" else []
    parts = [part for part in [*first, *texts_] if part]
    rest = turns[1:] if first else turns
    return [Message("system", "\n\n".join(parts)), *rest] if parts else rest


def check_order(turns: list[Message]) -> None:
    """Raises DataError, without a place, for turns that are no conversation which ends with an answer."""
    roles = [turn.role for turn in turns]
    if not roles:
        raise DataError("there is a system turn and nothing else")
    start = 1 if roles[0] == "system" else 0
    if "system" in roles[start:]:
        raise DataError("a system turn stands in the middle; it is the first turn or none")
    for before, role in zip(roles[start:], roles[start + 1 :], strict=False):
        if before == role != "tool":
            raise DataError(f"two {role} turns in a row; join them, or name whose turn it is")
    if roles[start : start + 1] == ["tool"]:
        raise DataError("the conversation begins with what a function gave back; a call comes before it")
    if roles[-1] != "assistant":
        raise DataError(f"the last turn is the {roles[-1]}'s; the model learns what the assistant says, so end with it")
    if not any(turn.supervised for turn in turns):
        raise DataError("no turn is to be learnt: every answer has weight 0")
