"""Answers to compare: read in every shape they come in, encoded whole behind one prompt, never parted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer_folder
from tiny_encoders import wordpiece_folder
from tiny_models import tiny_loaded

from tunesmith.core.errors import DataError
from tunesmith.core.problem import Comparison
from tunesmith.data.batch import to_batch
from tunesmith.data.codec import Codec
from tunesmith.data.deal import deal
from tunesmith.data.encode import TOO_LONG, Dropped, Example, encode_row
from tunesmith.data.encode_answers import SAME, TIED, encode_compared
from tunesmith.data.formats import convert, fits
from tunesmith.data.pack import Cursor, Sizes, Step, cut
from tunesmith.data.preview import previews
from tunesmith.data.rows import Compared
from tunesmith.data.statistics import DataStatistics
from tunesmith.data.templates import Template, open_template
from tunesmith.data.token_file import TokenFile, TokenWriter
from tunesmith.models.policy import Policy
from tunesmith.models.shared import compacted

PAIR = {"prompt": "name three colours, please.", "chosen": "Red, green and blue", "rejected": "the lazy dog"}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "why"}]

SHAREGPT = [{"from": turn["role"], "value": turn["content"]} for turn in TALK]


def row_of(data: dict[str, Any], name: str = "preference") -> Compared:
    assert fits(data) == name
    made = convert(data, name, "rows.jsonl:3")
    assert isinstance(made, Compared)
    return made


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.open(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def template(codec: Codec) -> Template:
    return open_template("auto", codec)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": TALK, "chosen": "because", "rejected": "no"},
        {"prompt": TALK, "chosen": answer("because"), "rejected": [answer("no")]},
        {"messages": TALK, "chosen": [*TALK, answer("because")], "rejected": [*TALK, answer("no")]},
        {"chosen": [*TALK, answer("because")], "rejected": [*TALK, answer("no")]},
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": "because"}, "rejected": {"from": "gpt", "value": "no"},
        },
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant: because",
            "rejected": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:  no",
        },
    ],
)  # fmt: skip
def test_every_shape_of_a_pair_is_one_row(data: dict[str, Any]) -> None:
    """Kills: a prompt that is part of the answers; sides swapped; a dialogue that is one text."""
    made = row_of(data)
    assert [(turn.role, turn.content) for turn in made.prompt] == [(t["role"], t["content"]) for t in TALK]
    assert [[turn.content for turn in turns] for turns in made.answers] == [["because"], ["no"]]
    assert made.ranks == (0, 1)
    for dialogue in made.dialogues:
        assert [turn.supervised for turn in dialogue.messages] == [False, False, False, True]


def test_dialogues_that_part_early_keep_their_own_turns() -> None:
    """Only the last answer of each is learnt. Kills: an answer compared behind the other's turns."""
    data = {"chosen": "\n\nHuman: hi\n\nAssistant: one\n\nHuman: two\n\nAssistant: three",
            "rejected": "\n\nHuman: hi\n\nAssistant: four"}  # fmt: skip
    made = row_of(data)
    assert [len(turns) for turns in made.answers] == [3, 1]
    assert [sum(turn.supervised for turn in dialogue.messages) for dialogue in made.dialogues] == [1, 1]


def test_rankings_are_sorted_with_their_ties() -> None:
    """D > C > A = B. Kills: ranks read as scores; answers that lose their ranks on the way."""
    data = {"prompt": "x", "answers": ["A", "B", "C", "D"], "ranks": [7, 7, 2.5, 1]}
    made = row_of(data, "ranking")
    assert [turns[0].content for turns in made.answers] == ["D", "C", "A", "B"]
    assert made.ranks == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("data", "name", "told"),
    [
        ({"prompt": "x", "chosen": " ", "rejected": "b"}, "preference", "'chosen' holds an empty text"),
        ({"chosen": "a", "rejected": "b"}, "preference", "without a key 'prompt'"),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "preference", "no prompt in common"),
        ({"prompt": "x", "answers": ["a", "b"], "ranks": [1]}, "ranking", "a list of 2 numbers"),
        ({"prompt": "x", "answers": ["a"], "ranks": [1]}, "ranking", "two answers or more"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "unpaired", "true (good) or false (bad)"),
        ({"prompt": TALK[:2], "chosen": "a", "rejected": "b"}, "preference", "two assistant turns in a row"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(data: dict[str, Any], name: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(data, name, "rows.jsonl:3")
    assert told in caught.value.message
    assert caught.value.where == "rows.jsonl:3"


def encoded(
    codec: Codec, template: Template | None, data: dict[str, Any], length: int = 512, **more: Any
) -> Example | Dropped:
    wanted: Comparison = more.get("wanted", "rankings")
    return encode_compared(row_of(data, more.get("name", "preference")), template, codec, length, wanted)


def test_documents_share_their_prompt_and_end_with_their_answer(codec: Codec, template: Template) -> None:
    """Exactly one supervised end token an answer, the last token of its document: there a score is read.

    Kills: a line end behind the end token; a prompt that is learnt.
    """
    found = encoded(codec, template, PAIR)
    assert isinstance(found, Example)
    chosen, rejected = found.documents()
    starts = [document.supervised.index(True) for document in (chosen, rejected)]
    assert chosen.ids[: starts[0]] == rejected.ids[: starts[1]]
    for document, start, text in zip((chosen, rejected), starts, (PAIR["chosen"], PAIR["rejected"]), strict=True):
        assert codec.decode(document.ids[start:], skip_special=False) == text + "<|im_end|>"
        assert all(document.supervised[start:])
    alone = encode_row(row_of(PAIR).dialogues[0], template, codec, 512)
    assert isinstance(alone, Example)
    assert alone.ids[: len(chosen.ids)] == chosen.ids, "rendered as everywhere"


def test_a_long_row_loses_the_same_of_its_prompt_or_is_left_out_whole(codec: Codec, template: Template) -> None:
    """Kills: answers that know different parts of the prompt; a pair of which one side is left."""
    whole = encoded(codec, template, PAIR)
    assert isinstance(whole, Example)
    longest, start = max(whole.lengths), whole.supervised.index(True)
    for over in (1, start - 1):
        cut_ = encoded(codec, template, PAIR, longest - over)
        assert isinstance(cut_, Example)
        assert [a.ids[over:] for a in whole.documents()] == [b.ids for b in cut_.documents()]
        assert cut_.truncated_tokens == 2 * over
    assert encoded(codec, template, PAIR, longest - start) == Dropped(TOO_LONG, "rows.jsonl:3")


def test_rows_that_teach_nothing_are_left_out_with_a_reason(codec: Codec, template: Template) -> None:
    assert encoded(codec, template, {**PAIR, "rejected": PAIR["chosen"]}) == Dropped(SAME, "rows.jsonl:3")
    tie = {"prompt": "x", "answers": ["a", "b"], "ranks": [1, 1]}
    assert encoded(codec, template, tie, name="ranking", wanted="pairs") == Dropped(TIED, "rows.jsonl:3")
    assert isinstance(encoded(codec, template, tie, name="ranking"), Example)
    single = {"prompt": "x", "completion": "a", "label": 1}
    with pytest.raises(DataError, match="no other to be compared with"):
        encoded(codec, template, single, name="unpaired")
    assert isinstance(encoded(codec, template, single, name="unpaired", wanted="judged"), Example)
    three = {"prompt": "x", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]}
    with pytest.raises(DataError, match="3 ranked answers"):
        encoded(codec, template, three, name="ranking", wanted="pairs")
    with pytest.raises(DataError, match="none to copy"):
        encode_row(row_of(PAIR), template, codec, 512)


def test_an_encoder_reads_prompt_and_answer_as_two_texts(tmp_path: Path) -> None:
    """Kills: a separator or a type left out; an answer cut with its prompt."""
    codec = Codec.open(wordpiece_folder(tmp_path))
    data = {"prompt": "the film is good and the book is dull", "chosen": "lovely", "rejected": "very bad"}
    found = encoded(codec, None, data, 9)
    assert isinstance(found, Example)
    shown = [codec.decode(part.ids, skip_special=False) for part in found.documents()]
    assert shown == ["[CLS] the book is dull [SEP] lovely [SEP]", "[CLS] the book is dull [SEP] very bad [SEP]"]
    assert [sum(part.types) for part in found.documents()] == [2, 3]
    assert encoded(codec, None, data, 5) == Dropped(TOO_LONG, "rows.jsonl:3")


def many(codec: Codec, template: Template) -> list[Example]:
    made = []
    for number in range(9):
        data = {"prompt": f"number {number}", "answers": ["a" * (3 + number), "b", "cc"], "ranks": [1, 2, 2]}
        made.append(encoded(codec, template, data, name="ranking"))
    return made  # type: ignore[return-value]


def test_a_row_is_never_parted(codec: Codec, template: Template, tmp_path: Path) -> None:
    """By micro-batches, processes or the files of tokens. Kills: documents that are counted as rows."""
    rows = many(codec, template)
    tokens = max(len(row.ids) for row in rows)
    step = Step(1, cut(rows, Sizes(tokens_per_step=10**6, micro_batch_tokens=2 * tokens)), Cursor(), 1.0)
    assert (step.rows, step.tokens) == (9, sum(sum(row.lengths) for row in rows))
    batches = [to_batch(held) for held in (*step.micro_batches, *deal(step, 2))]
    assert all(set(batch.answers) == {3} for batch in batches)
    assert sum(batch.row_count for batch in batches) == 18
    for batch in batches:
        assert len(batch.lengths) == 3 * batch.row_count
        assert batch.ranks is not None
        assert batch.ranks.tolist() == [0, 1, 1] * batch.row_count
        ends = torch.tensor(batch.lengths).cumsum(0) - 1
        assert set(batch.ids[ends].tolist()) == {codec.eos}
    writer = TokenWriter(tmp_path / "rows.arrow")
    for row in rows:
        writer.add(1, row)
    writer.finish()
    kept = TokenFile(tmp_path / "rows.arrow")
    assert [kept.tokens(place, "rows.jsonl:3") for place in range(9)] == rows


def test_the_prompt_of_a_row_is_computed_once(codec: Codec, template: Template) -> None:
    """Kills: a batch whose documents no longer lie as the shared beginning needs them."""
    row = encoded(codec, template, PAIR)
    assert isinstance(row, Example)
    found = compacted(Policy(tiny_loaded("llama", vocab_size=400)), to_batch([row]))
    assert found is not None
    prompt = row.supervised.index(True)
    answers = sum(row.supervised)
    assert len(found.tokens) <= prompt + answers
    assert len(found.places) == len(row.ids) == 2 * prompt + answers


def test_people_see_both_answers_and_their_lengths(codec: Codec, template: Template) -> None:
    """Kills: a preview of one side; prompts counted as answers."""
    row = encoded(codec, template, PAIR)
    assert isinstance(row, Example)
    shown = previews(row, codec)
    assert [one.rank for one in shown] == ["chosen", "rejected"]
    assert ["".join(p.text for p in one.pieces if p.supervised) for one in shown] == [
        PAIR["chosen"] + "<|im_end|>", PAIR["rejected"] + "<|im_end|>"
    ]  # fmt: skip
    found = DataStatistics(rows=1)
    found.add(row)
    lengths = [sum(document.supervised) for document in row.documents()]
    assert f"answers of {lengths[0]} tokens on average where chosen, {lengths[1]} where rejected" in found.line()
    assert found.longest_tokens == max(row.lengths)
