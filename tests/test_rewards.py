"""Rewards: what each says of right, nearly right and hostile completions, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.data.encode import Prompt
from tunesmith.data.formats import convert
from tunesmith.evaluate.rewards import REWARDS, open_rewards

CALL = '{"name": "add", "arguments": {"a": 1, "b": [2, 3]}}'
SQL = "SELECT notes FROM table WHERE state = 'Tasmania'"


def prompt(answer: str = "42", **more: Any) -> Prompt:
    row = {"prompt": "What is six times seven?", "answer": answer, **more}
    found = convert(row, "prompts", "rows.jsonl:3")
    return Prompt([1, 2], found, row)  # type: ignore[arg-type]


def earned(entry: dict[str, Any], answer: str, completion: str) -> float:
    [reward] = open_rewards([entry])
    return reward(prompt(answer), completion)


CASES = [
    ({"kind": "exact_answer"}, "42", " 42\n", 1.0),
    ({"kind": "exact_answer"}, "Forty Two", "forty  two", 1.0),
    ({"kind": "exact_answer"}, "42", "it is 42", 0.0),
    ({"kind": "exact_answer"}, "42", "", 0.0),
    ({"kind": "exact_answer", "after": "####"}, "6 x 7 #### 42", "7 x 6 = 41 #### 41, no #### 42", 1.0),
    ({"kind": "exact_answer", "after": "####"}, "#### 42", "42", 0.0),
    ({"kind": "function_call"}, CALL, '{"arguments": {"b": [2, 3], "a": 1.0}, "name": "add"}', 1.0),
    ({"kind": "function_call"}, CALL, '{"name": "add", "arguments": {"a": true, "b": [2, 3]}}', 0.0),
    ({"kind": "function_call"}, CALL, CALL + " ok", 0.0),
    ({"kind": "function_call", "named": 0.25}, CALL, '{"name": "add", "arguments": {}}', 0.25),
    ({"kind": "function_call"}, CALL, "[" * 100_000, 0.0),
    ({"kind": "json", "keys": ["a"]}, "", '{"a": null}', 1.0),
    ({"kind": "json", "keys": ["a"]}, "", '{"b": 1}', 0.0),
    ({"kind": "json"}, "", "[1]", 0.0),
    ({"kind": "logical_form"}, SQL, "select NOTES from t where State = 'tasmania';", 1.0),
    ({"kind": "logical_form"}, SQL, "SELECT state FROM table WHERE state = 'Tasmania'", 0.0),
    ({"kind": "logical_form", "parsed": 0.1}, SQL, "SELECT state FROM table", 0.1),
    ({"kind": "logical_form", "parsed": 0.1}, SQL, "notes of Tasmania", 0.0),
    ({"kind": "regex", "pattern": r"(?s)^\d+$"}, "", "42", 1.0),
    ({"kind": "regex", "pattern": r"(?s)^\d+$"}, "", "42 or so", 0.0),
]


@pytest.mark.parametrize(("entry", "answer", "completion", "wanted"), CASES)
def test_a_reward_pays_for_what_it_says(entry: dict[str, Any], answer: str, completion: str, wanted: float) -> None:
    """Kills: a verifier that a constant satisfies; true for 1; a crash on hostile JSON."""
    assert earned(entry, answer, completion) == wanted


def test_every_verifier_of_the_table_has_a_case_that_earns_and_one_that_does_not() -> None:
    """Kills: a reward without a test."""
    for kind in set(REWARDS.names()) - {"python", "run"}:
        assert {bool(wanted) for entry, _, _, wanted in CASES if entry["kind"] == kind} == {True, False}


def own(folder: Path, body: str) -> str:
    path = folder / "own.py"
    path.write_text(f"def judge(prompt, completion, row):\n    {body}\n")
    return f"{path}:judge"


def test_a_function_sees_the_prompt_the_completion_and_the_row(tmp_path: Path) -> None:
    """Kills: a row without its own keys."""
    function = own(tmp_path, "return len(completion) + row['level'] + prompt.startswith('What')")
    [reward] = open_rewards([{"kind": "python", "function": function}])
    assert reward(prompt(level=10), "abc") == 14.0


@pytest.mark.parametrize(
    ("body", "told"),
    [("return 1 / 0", "ZeroDivisionError"), ("return float('nan')", "gave nan"), ("return 'x'", "gave 'x'")],
)
def test_what_a_function_does_wrong_is_told_with_its_name(body: str, told: str, tmp_path: Path) -> None:
    """Kills: a traceback; a nan that becomes an advantage."""
    function = own(tmp_path, body)
    [reward] = open_rewards([{"kind": "python", "function": function}])
    with pytest.raises(DataError) as caught:
        reward(prompt(), "abc")
    assert told in str(caught.value)
    assert "rows.jsonl:3" in str(caught.value)
    assert "own.py:judge" in str(caught.value)


def test_a_row_without_a_call_is_named() -> None:
    """Kills: text answers that pay for saying anything but a call."""
    with pytest.raises(DataError, match="no function call") as caught:
        earned({"kind": "function_call"}, "hello", "hello")
    assert "rows.jsonl:3" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"kind": "exact_anwser"}, "'exact_anwser' is no reward"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "regex"}, "pattern"),
        ({"kind": "exact_answer", "befor": "x"}, "its keys are weight after"),
        ({"kind": "stage:reward"}, "this one has none"),
        ({"kind": "run", "run": "runs/reward"}, "no run with an adapter"),
        ({"kind": "python", "function": "nowhere.py:judge"}, "cannot be read"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_before_a_model_is_loaded(entry: dict[str, Any], told: str) -> None:
    """Kills: a mistake that is found in the first step."""
    with pytest.raises(ConfigError) as caught:
        _checked(entry)
    assert told in f"{caught.value} {caught.value.hint}"


def _checked(entry: dict[str, Any]) -> None:
    for reward in open_rewards([entry]):
        reward.check_there()


def test_a_function_that_is_not_in_its_file_is_named(tmp_path: Path) -> None:
    """Kills: a file that is run to find that out."""
    path = own(tmp_path, "return 0").replace(":judge", ":judgee")
    with pytest.raises(ConfigError, match="no function 'judgee'; there are judge"):
        open_rewards([{"kind": "python", "function": path}])
