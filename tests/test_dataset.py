"""Files as training examples: counts that add up, problems shown together, previews and batches of what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer_folder

from tunesmith.core.errors import DataError
from tunesmith.data.codec import Codec
from tunesmith.data.dataset import DAMAGED, Dataset, open_data
from tunesmith.data.encode import Dropped, Example
from tunesmith.data.preview import preview, visible
from tunesmith.data.section import DataSection

GOOD = {"prompt": "What is the capital of France?", "completion": " Paris."}


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def dataset(path: Path, rows: list[Any], **settings: Any) -> Dataset:
    file = path / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    section = DataSection(train=str(file), **settings)  # type: ignore[arg-type]
    return open_data(section.train, section, Codec.open(tiny_tokenizer_folder(path / "tokenizer")))


def test_kept_and_left_out_add_up(tmp_path: Path) -> None:
    """Kills: losing a row without counting it; counting cut rows as left out."""
    rows = [chat("Hi", "Hello."), chat("one two three " * 30, "Red."), chat("Hi", "blue white and red " * 30)]
    found = dataset(tmp_path, [*rows, rows[0]], max_length=60).check()
    assert (found.rows, found.examined, found.kept) == (4, 4, 3)
    assert dict(found.dropped) == {"the answer alone is longer than max_length": 1}
    assert found.truncated_rows == 1
    assert found.truncated_tokens > 0
    assert found.duplicates == 1
    assert sum(found.lengths.values()) == found.kept
    assert found.longest_tokens == 60
    assert json.loads(json.dumps(found.as_json()))["dropped"] == dict(found.dropped)


def test_nothing_to_learn_is_an_error_that_says_why(tmp_path: Path) -> None:
    """Kills: a run over no row at all that ends well."""
    rows = [chat("Hi", "blue white and red " * 30)] * 3
    with pytest.raises(DataError, match=r"0 trainable rows of 3 .*3 rows: the answer alone is longer") as caught:
        dataset(tmp_path, rows, max_length=20).check()
    assert caught.value.exit_code == 3
    assert "data.max_length" in caught.value.hint


def test_problems_are_shown_together_with_their_count(tmp_path: Path) -> None:
    """Kills: stopping at the first bad row; an endless list."""
    bad = [{"messages": [{"role": "user", "content": 5}]}] * 30
    data = dataset(tmp_path, [chat("Hi", "Hello."), *bad], format="messages")
    with pytest.raises(DataError) as caught:
        data.check(limit=5)
    text = str(caught.value)
    assert "rows.jsonl:2" in text
    assert "rows.jsonl:6" in text
    assert "rows.jsonl:7" not in text
    assert "and 25 more" in text


def test_bad_rows_are_skipped_and_counted_on_request_only(tmp_path: Path) -> None:
    """Kills: skipping by default; skipping without counting."""
    bad = {"messages": [{"role": "user", "content": 5}]}
    rows = [chat("Hi", "Hello."), bad, chat("Bye", "Bye.")]
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        dataset(tmp_path, rows, format="messages").example(0, 1)
    data = dataset(tmp_path, rows, format="messages", skip_bad_rows=True)
    assert isinstance(data.example(0, 1), Dropped)
    found = data.check()
    assert (found.kept, dict(found.dropped)) == (2, {DAMAGED: 1})
    assert [one.completion for one in data.dialogues()] == ["Hello.", "Bye."]
    assert [one.completion for one in data.dialogues(limit=1)] == ["Hello."]


def test_bare_prompts_are_joined_without_the_template_unless_one_is_named(tmp_path: Path) -> None:
    """Kills: putting a chat template around prompt_completion rows, or ignoring the one that is named."""
    data = dataset(tmp_path, [GOOD])
    example = data.example(0, 0)
    assert isinstance(example, Example)
    assert data.codec.decode(example.ids, skip_special=False) == GOOD["prompt"] + GOOD["completion"] + "<|im_end|>"
    assert "template plain" in data.describe()
    named = dataset(tmp_path, [GOOD], template="alpaca").example(0, 0)
    assert isinstance(named, Example)
    assert "### Instruction:" in data.codec.decode(named.ids)


def test_a_prompt_of_the_dataset_is_how_its_example_starts(tmp_path: Path) -> None:
    """Kills: evaluating with another template than the one that is trained with."""
    for row in (GOOD, chat("Hi <|im_end|>", "Hello.")):
        data = dataset(tmp_path, [row])
        example = data.example(0, 0)
        assert isinstance(example, Example)
        prompt = data.prompt_ids(data.dialogue(0, 0))
        assert example.ids[: len(prompt)] == prompt


def test_the_description_names_rows_format_and_template(tmp_path: Path) -> None:
    """Kills: detecting a format without saying so."""
    line = dataset(tmp_path, [chat("Hi", "Hello.")] * 3).describe()
    assert "3 rows" in line
    assert "format messages" in line
    assert "template of the model" in line


def test_a_preview_is_the_whole_row_with_the_answer_marked(tmp_path: Path) -> None:
    """Kills: previewing the file instead of the tokens; marking the header or leaving the end token out."""
    data = dataset(tmp_path, [chat("Hi, ünïcode 🙂", "Hello 你好."), chat("a", "b")])
    first, second = data.preview(5)
    shown = "".join(piece.text for piece in first.pieces)
    assert shown == "<|im_start|>user\nHi, ünïcode 🙂<|im_end|>\n<|im_start|>assistant\nHello 你好.<|im_end|>\n"
    assert [piece.text for piece in first.pieces if piece.supervised] == ["Hello 你好.", "<|im_end|>"]
    assert [piece.text for piece in first.pieces if piece.control] == ["<|im_start|>", "<|im_end|>"] * 2
    assert first.supervised_tokens < first.tokens
    assert second.where.endswith("rows.jsonl:2")


def test_a_preview_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    """Kills: printing escape sequences or direction marks of a row as they are."""
    data = dataset(tmp_path, [chat("a\x1b[2Jb\u202ec\r", "ok\n")])
    example = data.example(0, 0)
    assert isinstance(example, Example)
    shown = "".join(piece.text for piece in preview(example, data.codec).pieces)
    assert "a\\x1b[2Jb\\u202ec\\x0d" in shown
    assert visible("two\nlines\tand é") == "two\nlines\tand é"


def test_control_strings_in_rows_are_counted(tmp_path: Path) -> None:
    """Kills: escaping without saying so."""
    found = dataset(tmp_path, [chat("Hi <|im_end|>", "Hello."), chat("Hi", "Hello.")]).check()
    assert found.escaped_rows == 1
    assert "control-token strings" in found.line()


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """Kills: reporting before or without the last row."""
    seen: list[tuple[int, int]] = []
    dataset(tmp_path, [chat("Hi", "Hello.")] * 4).check(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_overlap_of_two_datasets_is_counted(tmp_path: Path) -> None:
    """Kills: comparing by place or by object."""
    first = dataset(tmp_path, [chat("a", "b"), chat("c", "d"), chat("e", "f")]).check()
    second = dataset(tmp_path, [chat("c", "d"), chat("g", "h")]).check()
    assert first.shared_with(second) == 1


def test_a_batch_is_documents_end_to_end_and_none_predicts_the_next() -> None:
    """Kills: shifting targets twice or not at all; predicting a first token from the document before it."""
    from tunesmith.data.batch import to_batch

    rows = [
        Example([5, 6, 7, 8], [False, False, True, True], "a:1"),
        Example([9, 10], [True, True], "a:2"),  # even a first token that claims to be learnt is not
        Example([11, 12, 13], [False, True, False], "a:3"),
    ]
    batch = to_batch(rows)
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert batch.lengths == (4, 2, 3)
    assert batch.targets.tolist() == [7, 8, 10, 12]
    assert batch.sources.tolist() == [1, 2, 4, 6]
    assert batch.rows == ("a:1", "a:2", "a:3")
    assert batch.ids.dtype == batch.sources.dtype == batch.targets.dtype
    document = [0] * 4 + [1] * 2 + [2] * 3
    assert all(document[place] == document[place + 1] for place in batch.sources.tolist())
