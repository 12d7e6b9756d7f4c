"""The table of rewards: one line each, loaded when used; and several of them, weighted, as one.

A reward is a section of the configuration and a function of a prompt and a completion; see `reward.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunesmith.core.errors import ConfigError
from tunesmith.core.registry import Registry

if TYPE_CHECKING:
    from tunesmith.evaluate.rewards.reward import Reward

_HERE = "tunesmith.evaluate.rewards"
REWARDS = Registry(
    "reward",
    {
        "exact_answer": (f"{_HERE}.exact_answer:ExactAnswer", "1 for an answer of the data, spaces and case aside"),
        "function_call": (f"{_HERE}.function_call:FunctionCall", "1 for the call that the data has, as JSON"),
        "json": (f"{_HERE}.json_object:JsonObject", "1 for a JSON object that has some keys"),
        "logical_form": (f"{_HERE}.logical_form:LogicalForm", "1 for SQL that asks what the data's asks"),
        "python": (f"{_HERE}.python:Python", "what a function of yours says, named as file.py:function"),
        "regex": (f"{_HERE}.regex:Regex", "1 where a pattern is found"),
        "run": (f"{_HERE}.trained:Trained", "what a reward model says: the folder of a run of objective: reward"),
    },
)


def open_rewards(entries: Iterable[Mapping[str, Any]], where: str = "objective.reward") -> list[Reward]:
    """The rewards that sections name. Raises ConfigError for a kind that is not there or settings that do not fit."""
    return [_open(dict(entry), where) for entry in entries]


def _open(entry: dict[str, Any], where: str) -> Reward:
    name = str(entry["kind"])
    if name.startswith("stage:"):
        told = f"{name!r} is of a file with a list of stages, and this one has none"
        raise ConfigError(told, where=where, hint="name the folder of the reward run")
    kind = REWARDS.load(name, where)
    try:
        reward: Reward = kind.model_validate(entry)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        keys = " ".join(key for key in kind.model_fields if key != "kind")
        raise ConfigError(f"{name}: {told}", where=where, hint=f"its keys are {keys}") from error
    try:
        reward.check()
    except ConfigError as error:
        error.where = where
        raise
    return reward
