"""What the keys of a row mean: every format, found by keys alone, and each mistake named with file, line and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.data.formats import FORMATS, convert, detect, fits, format_of
from tunesmith.data.lines import RawRow
from tunesmith.data.rows import Compared, Dialogue, Labelled, Message, Row, Tagged, Text
from tunesmith.data.sources import open_source

CALL = '{"name": "get_news", "arguments": {"topics": ["tech"], "page": 2}}'
TOOL = {"name": "get_news", "description": "Latest news", "parameters": {"type": "object"}}

EXAMPLES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add", "input": "1 and 2", "output": "3"},
    "dolly": {"instruction": "Add", "context": "1 and 2", "response": "3", "category": "math"},
    "messages": {"messages": [{"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]},
    "prompt_completion": {"prompt": "1 + 2 =", "completion": " 3", "references": [" 3", " three"]},
    "prompts": {"prompt": "1 + 2?", "answer": ["3", "three"]},
    "text": {"text": "One and two are three."},
    "labelled": {"text": "It was fun.", "text_pair": "It was good.", "label": "entailment"},
    "tagged": {"tokens": ["It", "was", "fun"], "labels": ["PRON", "VERB", "ADJ"]},
    "preference": {"prompt": "Add 1 and 2", "chosen": "3", "rejected": "12"},
    "ranking": {"prompt": "Add 1 and 2", "answers": ["12", "3", "three"], "ranks": [2, 1, 1]},
    "unpaired": {"prompt": "Add 1 and 2", "completion": "12", "label": False},
}
KINDS = {"text": Text, "labelled": Labelled, "tagged": Tagged}
KINDS |= dict.fromkeys(("preference", "ranking", "unpaired"), Compared)


def roles(row: Row) -> list[str]:
    assert isinstance(row, Dialogue)
    return [turn.role for turn in row.messages]


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def failure(data: dict[str, Any], name: str) -> DataError:
    with pytest.raises(DataError) as caught:
        convert(data, name, "rows.jsonl:17")
    assert caught.value.where == "rows.jsonl:17"
    assert caught.value.hint
    assert caught.value.exit_code == 3
    return caught.value


def source_of(path: Path, rows: list[Any]) -> Any:
    file = path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return open_source(str(file))


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_found_by_its_keys_and_converts(name: str) -> None:
    """Kills: a format that another one, earlier in the table, takes for itself."""
    row = EXAMPLES[name]
    assert fits(row) == name
    assert fits(dict(reversed(row.items()))) == name
    made = convert(row, name, "a.jsonl:1")
    assert isinstance(made, KINDS.get(name, Dialogue))
    assert made.where == "a.jsonl:1"


def test_prompts_have_answers_to_compare_with_or_none() -> None:
    """Kills: an answer that is learnt although there is none; a row of pairs that is taken for a prompt."""
    made = convert(EXAMPLES["prompts"], "prompts", "a.jsonl:1")
    assert isinstance(made, Dialogue)
    assert made.answers == ("3", "three")
    assert roles(made) == ["user", "assistant"]
    bare = convert({"prompt": "1 + 2?"}, "prompts", "a.jsonl:1")
    assert isinstance(bare, Dialogue)
    assert (bare.completion, bare.messages[-1].supervised) == ("", False)
    assert fits({"prompt": "1 + 2?", "chosen": "3", "rejected": "4"}) == "preference"
    assert fits({"prompt": "1 + 2?", "answers": ["3"], "ranks": [1]}) == "ranking"


def test_the_formats_of_instructions_keep_instruction_and_context_apart() -> None:
    for name in ("alpaca", "dolly"):
        row = convert(EXAMPLES[name], name, "")
        assert isinstance(row, Dialogue)
        assert row.messages == (Message("user", "Add", context="1 and 2"), Message("assistant", "3", True))
        assert row.messages[0].text == "Add\n\n1 and 2"
    bare = convert({"instruction": "Hi", "input": None, "output": "Hello"}, "alpaca", "")
    assert isinstance(bare, Dialogue)
    assert bare.prompt[0].text == "Hi"


def test_history_and_system_of_alpaca_become_turns() -> None:
    """Kills: silently ignoring what came before."""
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    made = convert(row, "alpaca", "")
    assert isinstance(made, Dialogue)
    assert [turn.content for turn in made.messages] == ["s", "a", "b", "c", "d"]
    assert roles(made) == ["system", "user", "assistant", "user", "assistant"]
    assert "pairs of texts" in failure({**row, "history": [["a"]]}, "alpaca").message


def test_a_bare_prompt_keeps_its_references_and_asks_for_no_template() -> None:
    row = convert(EXAMPLES["prompt_completion"], "prompt_completion", "")
    assert isinstance(row, Dialogue)
    assert row.plain
    assert (row.completion, row.answers) == (" 3", (" 3", " three"))
    assert convert({"prompt": "", "completion": "x"}, "prompt_completion", "") is not None


def test_every_assistant_turn_is_learnt_unless_its_weight_is_zero() -> None:
    """Kills: learning the last answer alone; learning what weight 0 excludes; learning user turns."""
    data = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    made = convert(data, "messages", "")
    assert isinstance(made, Dialogue)
    assert [turn.supervised for turn in made.messages] == [False, False, True, False, True]
    data["messages"][2]["weight"] = 0
    made = convert(data, "messages", "")
    assert isinstance(made, Dialogue)
    assert [turn.supervised for turn in made.messages] == [False, False, False, False, True]
    data["messages"][4]["weight"] = 0
    assert "weight 0" in failure(data, "messages").message


def test_calls_of_both_formats_become_the_same_turns() -> None:
    """Kills: a call kept as an escaped text inside a text; tools that never reach the prompt."""
    shared = {
        "conversations": [
            {"from": "human", "value": "News?"},
            {"from": "function_call", "value": json.dumps(json.loads(CALL), indent=2)},
            {"from": "observation", "value": "[]"},
            {"from": "gpt", "value": "None."},
        ],
        "tools": json.dumps([TOOL]),
    }
    call = {"id": "1", "function": {"name": "get_news", "arguments": '{"topics":["tech"],"page":2}'}}
    opened = {
        "messages": [
            {"role": "user", "content": "News?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "[]"},
            {"role": "assistant", "content": [{"type": "text", "text": "None."}]},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    one, other = convert(shared, "sharegpt", ""), convert(opened, "messages", "")
    assert one == other
    assert isinstance(one, Dialogue)
    assert roles(one) == ["system", "user", "assistant", "tool", "assistant"]
    assert one.messages[2] == Message("assistant", CALL, supervised=True)
    assert one.messages[0].content.endswith(json.dumps(TOOL))
    assert json.loads(one.messages[0].content.splitlines()[-1]) == TOOL


def test_tools_join_a_system_turn_that_is_there() -> None:
    data = chat(("system", "Be kind."), ("user", "a"), ("assistant", "b"), tools=[TOOL])
    made = convert(data, "messages", "")
    assert isinstance(made, Dialogue)
    assert roles(made) == ["system", "user", "assistant"]
    assert made.messages[0].content.startswith("Be kind.\n\nYou can call")
    empty = convert({**EXAMPLES["sharegpt"], "tools": "[]", "system": "Be kind."}, "sharegpt", "")
    assert isinstance(empty, Dialogue)
    assert empty.messages[0] == Message("system", "Be kind.")


def test_several_calls_of_one_turn_are_a_line_each() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b")]
    data = chat(("user", "x"), ("assistant", ""))
    data["messages"][1]["tool_calls"] = calls
    made = convert(data, "messages", "")
    assert isinstance(made, Dialogue)
    assert [json.loads(line)["name"] for line in made.completion.splitlines()] == ["a", "b"]


def test_conversations_held_as_text_are_read() -> None:
    """CSV has no lists."""
    row = {key: json.dumps(value) for key, value in EXAMPLES["sharegpt"].items()}
    assert convert(row, "sharegpt", "") == convert(EXAMPLES["sharegpt"], "sharegpt", "")


def test_a_label_is_a_class_or_a_finite_score() -> None:
    """Kills: true as 1; NaN as a score."""
    for label in ("yes", 0, 3, 2.5):
        made = convert({"text": "a", "label": label}, "labelled", "")
        assert isinstance(made, Labelled)
        assert made.label == label
        assert made.dialogue().completion == str(label)
    for wrong in (True, [1], float("inf"), " "):
        assert "'label'" in failure({"text": "a", "label": wrong}, "labelled").message


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "null": (
        "alpaca", {"instruction": "a", "output": None}, "the key 'output'; the row has instruction (output is null)",
    ),
    "number": ("alpaca", {"instruction": "a", "output": 3}, "the key 'output' holds a number (3); text is needed"),
    "true": ("alpaca", {"instruction": True, "output": "a"}, "the key 'instruction' holds true or false"),
    "list": ("dolly", {"instruction": ["a"], "response": "b"}, "the key 'instruction' holds a list"),
    "blank answer": ("alpaca", {"instruction": "a", "output": " \n"}, "the key 'output' holds an empty text"),
    "blank text": ("text", {"text": ""}, "the key 'text' holds an empty text"),
    "blank turn": ("messages", chat(("user", "a"), ("assistant", " ")), "turn 2, an answer, is empty"),
    "empty list": ("messages", {"messages": []}, "an empty list"),
    "no list": ("messages", {"messages": {"role": "user"}}, "holds an object; a list of turns is needed"),
    "a text": ("messages", {"messages": "hello"}, "the key 'messages' is not JSON"),
    "turn is text": ("messages", {"messages": ["hi"]}, "turn 1 is a text ('hi'); an object with 'role'"),
    "no content": ("messages", chat(("user", None), ("assistant", "b")), "turn 1: the key 'content' holds null"),
    "number turn": ("messages", chat(("user", 5), ("assistant", "b")), "turn 1: the key 'content' holds a number (5)"),
    "image": (
        "messages", chat(("user", [{"type": "image_url"}]), ("assistant", "b")), "a part of type 'image_url'",
    ),
    "unknown role": ("messages", chat(("usr", "a"), ("assistant", "b")), "turn 1 has the role 'usr'; roles are system"),
    "no role": ("messages", {"messages": [{"content": "a"}]}, "turn 1 has the role null"),
    "two users": ("messages", chat(("user", "a"), ("user", "b"), ("assistant", "c")), "two user turns in a row"),
    "two answers": ("messages", chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "two assistant turns"),
    "late system": ("messages", chat(("user", "a"), ("system", "b"), ("assistant", "c")), "a system turn stands in"),
    "last user": ("messages", chat(("user", "a"), ("assistant", "b"), ("user", "c")), "the last turn is the user's"),
    "only system": ("messages", chat(("system", "a")), "the last turn is the system's"),
    "first tool": ("messages", chat(("tool", "a"), ("assistant", "b")), "begins with what a function gave back"),
    "call without name": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"arguments": {}}'}]},
        "a function call needs a name",
    ),
    "call is no JSON": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "news()"}]},
        "turn 2, a function call, is not JSON",
    ),
    "tools are no JSON": ("sharegpt", {**EXAMPLES["sharegpt"], "tools": "get_news"}, "the key 'tools' is not JSON"),
    "tools are numbers": ("sharegpt", {**EXAMPLES["sharegpt"], "tools": "[1]"}, "something without a name"),
    "references": (
        "prompt_completion", {"prompt": "a", "completion": "b", "references": [1]}, "the key 'references' holds a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_does_not_fit_is_named_with_its_key_and_what_it_holds(case: str) -> None:
    """Kills: a default in place of an error; str() around what is no text."""
    name, data, expected = WRONG[case]
    assert expected in failure(data, name).message


def test_a_missing_key_is_worded_as_documented() -> None:
    error = failure({"instruction": "a", "input": "b"}, "alpaca")
    assert str(error) == (
        "rows.jsonl:17: format alpaca needs the key 'output'; the row has instruction, input\n"
        "hint: set data.format to prompt_completion, or rename the key"
    )


def test_a_row_of_another_format_is_told_which(tmp_path: Path) -> None:
    assert "this row is messages" in failure(EXAMPLES["messages"], "alpaca").hint


def test_a_misspelt_role_or_format_names_the_nearest() -> None:
    assert failure(chat(("usr", "a"), ("assistant", "b")), "messages").hint == "did you mean user?"
    with pytest.raises(ConfigError) as caught:
        convert({}, "alpacca", "")
    assert caught.value.hint == "did you mean alpaca?"


def test_a_file_of_two_formats_is_refused_with_both_counts_and_first_lines(tmp_path: Path) -> None:
    """Kills: taking the format of the first row for all; counts of a sample given as counts of the file."""
    rows = [EXAMPLES["alpaca"]] * 2500 + [EXAMPLES["messages"]] * 700 + [EXAMPLES["alpaca"]] * 1500
    source = source_of(tmp_path, rows)
    with pytest.raises(DataError) as caught:
        format_of(source)
    assert caught.value.where == source.name
    assert f"alpaca 4000 (first {source.name}:1);" in caught.value.message
    assert f"messages 700 (first {source.name}:2501)" in caught.value.message
    assert format_of(source, "alpaca") == "alpaca"


def test_damaged_rows_do_not_vote_on_the_format(tmp_path: Path) -> None:
    assert format_of(source_of(tmp_path, ["oops", '{"instruction": "a"}', EXAMPLES["dolly"]])) == "dolly"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not JSON"):
        format_of(source_of(tmp_path, ['{"a"}', '{"a": 1']))


def test_keys_of_no_format_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the keys \(question, reply\) are of") as caught:
        format_of(source_of(tmp_path, [{"question": "a", "reply": "b"}]))
    assert "alpaca" in caught.value.hint
    with pytest.raises(DataError, match=r"format alpaca needs the key 'output'; the row has instruction, input"):
        format_of(source_of(tmp_path, [{"instruction": "a", "input": "b"}] * 3))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({**EXAMPLES["sharegpt"], "chosen": "b", "rejected": "c"}, "preference"),
        ({**EXAMPLES["messages"], "label": False}, "unpaired"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
    ],
)
def test_rows_that_judge_answers_are_not_taken_for_rows_to_imitate(row: dict[str, Any], name: str) -> None:
    """Kills: learning the rejected answers of a preference set because `messages` is there, too."""
    assert fits(row) == name == detect([RawRow(row, "a.jsonl:1")])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokens": ["a"], "labels": ["x", "y"]}, "1 tokens and 2 labels"),
        ({"tokens": "a b", "labels": ["x", "y"]}, "'tokens' holds"),
        ({"tokens": ["a", ""], "labels": ["x", "y"]}, "'tokens' holds"),
        ({"tokens": ["a", "b"], "labels": ["x", 0.5]}, "'labels' holds"),
    ],
)
def test_words_and_labels_that_do_not_fit_are_named(data: dict[str, Any], message: str) -> None:
    """Kills: a label put down to another word."""
    assert message in failure(data, "tagged").message
