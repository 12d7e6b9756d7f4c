"""Labelled rows for a head: framed as transformers frames them, labels as numbers, words at their first piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer_folder
from tiny_encoders import opinions, wordpiece_folder, write_rows
from transformers import AutoTokenizer

from tunesmith.core.errors import DataError
from tunesmith.core.problem import Problem
from tunesmith.data.batch import to_batch
from tunesmith.data.codec import Codec
from tunesmith.data.dataset import Dataset, open_data
from tunesmith.data.encode import Dropped, Example, encode_row
from tunesmith.data.labels import encode_labelled, find_labels, label_names
from tunesmith.data.rows import Dialogue, Labelled, Message, Tagged
from tunesmith.data.section import DataSection
from tunesmith.data.templates import open_template

YES_NO = Problem("classification", ("no", "yes"))
PAIRS = [
    ("the film is good", "that was a lovely film"),
    ("a " * 30 + "film", "quite good"),
    ("good", "the book was very dull , and the play , and the song ! " * 3),
    ("[CLS] the show [SEP] is fine", "a"),
]


def encoded(row: Any, codec: Codec, problem: Problem = YES_NO, max_length: int = 64) -> Example:
    found = encode_labelled(row, codec, max_length, problem)
    assert isinstance(found, Example)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wordpiece_folder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("max_length", [64, 20, 9])
@pytest.mark.parametrize("pair", [True, False])
def test_texts_are_framed_and_cut_as_transformers_does_it(folder: Path, max_length: int, pair: bool) -> None:
    """Kills: a missing SEP; a pair in one type; the shorter text cut; a control token from a user's text."""
    theirs, codec = AutoTokenizer.from_pretrained(folder), Codec.open(folder)
    for text, other in PAIRS:
        given = (text, other) if pair else (text,)
        wanted = theirs(
            *given, truncation="longest_first", max_length=max_length, split_special_tokens=True,
            return_token_type_ids=True,
        )  # fmt: skip
        row = Labelled(text, "yes", other if pair else None)
        found = encoded(row, codec, max_length=max_length)
        assert found.ids == wanted["input_ids"]
        assert list(found.types or [0] * len(found.ids)) == wanted["token_type_ids"]
        assert found.labels == (1,)
        assert found.truncated_tokens == len(encoded(row, codec, max_length=999).ids) - len(found.ids)


def test_a_tokenizer_without_a_frame_reads_two_texts_as_one(tmp_path: Path) -> None:
    """Kills: two texts that run into each other; a beginning token missing, or there twice."""
    for name, bos in (("with", "<|endoftext|>"), ("without", None)):
        codec = Codec.open(tiny_tokenizer_folder(tmp_path / name, bos=bos))
        codec.adds_bos = bos is not None
        found = encoded(Labelled("one line", "no", "another line"), codec)
        text = codec.decode(found.ids, skip_special=False)
        assert text == (bos or "") + "one line\nanother line"
        assert found.types == ()


def test_the_list_of_labels_does_not_depend_on_the_order_of_the_rows() -> None:
    """Kills: labels in the order of the rows; 10 before 9."""
    rows = [Labelled("a", label) for label in (10, 9, 2, 10)]
    assert find_labels(rows, "classification").labels == ("2", "9", "10")
    assert find_labels(rows[::-1], "classification").labels == ("2", "9", "10")
    assert find_labels([Labelled("a", "b"), Labelled("a", "10"), Labelled("a", "9")], "classification").labels == (
        "10",
        "9",
        "b",
    )
    assert find_labels([Tagged(("x", "y"), ("N", "D"))], "tokens").labels == ("D", "N")
    assert find_labels(rows, "regression").labels == ()


def test_a_label_that_training_did_not_have_names_its_row(folder: Path) -> None:
    """Kills: an unknown label that becomes the first."""
    codec = Codec.open(folder)
    with pytest.raises(DataError, match=r"'maybe' is not among those of the training data: no, yes") as caught:
        encode_labelled(Labelled("a", "maybe", where="dev.jsonl:3"), codec, 64, YES_NO)
    assert caught.value.where == "dev.jsonl:3"
    with pytest.raises(DataError, match="cannot learn from this row"):
        encode_labelled(Dialogue((Message("user", "a"),)), codec, 64, YES_NO)


@pytest.mark.parametrize("label", [0.5, "0.5", "-3.25"])
def test_a_score_is_no_class(folder: Path, label: Any) -> None:
    """Kills: every score a class of its own."""
    with pytest.raises(DataError, match="is a score, no class") as caught:
        encode_labelled(Labelled("a", label), Codec.open(folder), 64, YES_NO)
    assert "regression" in caught.value.hint


def test_scores_are_numbers_whatever_the_file_holds(folder: Path) -> None:
    codec = Codec.open(folder)
    values = [encoded(Labelled("good", label), codec, Problem("regression")) for label in (3, 2.5, "1.25")]
    assert [value.labels for value in values] == [(3.0,), (2.5,), (1.25,)]
    batch = to_batch(values)
    assert batch.labels is not None
    assert batch.labels.dtype == torch.float32
    with pytest.raises(DataError, match="is no number"):
        encode_labelled(Labelled("good", "high"), codec, 64, Problem("regression"))


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_word_is_labelled_at_its_first_piece(kind: str, folder: Path, tmp_path: Path) -> None:
    """Against transformers' word_ids where it has them. Kills: the last piece; labels shifted by the first token."""
    row = Tagged(("the", "filmgood", "isn't", "lovely"), ("D", "N", "V", "A"))
    problem = find_labels([row], "tokens")
    where = folder if kind == "words" else tiny_tokenizer_folder(tmp_path)
    codec = Codec.open(where)
    found = encoded(row, codec, problem)
    starts = [place for place, learnt in enumerate(found.supervised) if learnt]
    assert label_names(found.labels, problem) == ["D", "N", "V", "A"]
    if kind == "words":
        theirs = AutoTokenizer.from_pretrained(where)(list(row.words), is_split_into_words=True)
        assert found.ids == theirs["input_ids"]
        words = theirs.word_ids()
        assert starts == [words.index(number) for number in range(4)]
        assert len(found.ids) > 6 + 2, "some words have several pieces"
    else:
        texts = [codec.decode(found.ids[start:end]) for start, end in zip(starts, [*starts[1:], None], strict=True)]
        assert [text.strip() for text in texts] == list(row.words)
    batch = to_batch([found, found])
    assert batch.sources.tolist() == [*starts, *(start + len(found.ids) for start in starts)]
    assert batch.labels is not None
    assert batch.labels.tolist() == [*found.labels, *found.labels]


def test_words_that_were_cut_off_have_no_label(folder: Path) -> None:
    """Kills: labels of words that the model does not see."""
    row = Tagged(("good",) * 20, ("A", "B") * 10)
    found = encoded(row, Codec.open(folder), find_labels([row], "tokens"), max_length=8)
    assert len(found.ids) == 8
    assert found.labels == (0, 1, 0, 1, 0, 1)
    assert found.truncated_tokens == 14


def test_a_text_without_tokens_is_left_out(folder: Path) -> None:
    codec = Codec.open(folder)
    assert encode_labelled(Labelled("", "yes"), codec, 64, YES_NO) == Dropped("no token to read")
    assert isinstance(encode_labelled(Labelled("good", "yes"), codec, 2, YES_NO), Dropped)


def test_labelled_words_are_no_rows_for_a_model_that_writes(tmp_path: Path) -> None:
    codec = Codec.open(tiny_tokenizer_folder(tmp_path))
    with pytest.raises(DataError, match="no answer to write"):
        encode_row(Tagged(("a",), ("b",)), open_template("plain", codec), codec, 64)


def open_rows(path: Path, folder: Path, rows: list[dict[str, Any]], kind: Any = "classification") -> Dataset:
    section = DataSection(train=str(write_rows(path / "rows.jsonl", rows)))  # type: ignore[arg-type]
    dataset = open_data(section.train, section, Codec.open(folder))
    dataset.problem = find_labels(dataset.rows(), kind)
    return dataset


def test_a_check_counts_labels_and_names_rows_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    """Kills: statistics of supervised tokens where none are; the first problem alone."""
    data = open_rows(tmp_path, folder, opinions(12))
    found = data.check()
    assert "labels good: 6, bad: 6" in found.line()
    assert found.as_json()["labels"] == {"good": 6, "bad": 6}
    assert "one of 2 labels for each text: bad, good" in data.describe()
    [shown] = data.preview(1)
    assert shown.labels == ("good",)
    assert "".join(piece.text for piece in shown.pieces) == "[CLS] the film is good [SEP]"
    wrong = [*opinions(4), {"text": "x", "label": 0.5}, {"text": "y", "label": 1.5}]
    with pytest.raises(DataError, match=r"(?s)0\.5.*1\.5"):
        open_rows(tmp_path, folder, wrong).check()
    scores = open_rows(tmp_path, folder, [{"text": "good", "label": value} for value in (1, 4.5)], "regression")
    assert "scores from 1 to 4.5" in scores.check().line()
