"""Comparisons that others have made become prompts, answers and judgements; a row that is none is named."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.compare.incoming import incoming
from tunesmith.core.errors import DataError

HH = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: And now?\n\nAssistant:"
COMPARISONS: dict[str, tuple[dict[str, Any], list[str], list[list[int]]]] = {
    "hh": ({"chosen": f"{HH} Bye.", "rejected": f"{HH} What"}, ["Bye.", "What"], [[1, 2]]),
    "hh that part early": (
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: And?\n\nAssistant: c",
            "rejected": "\n\nHuman: Q\n\nAssistant: b",
        },
        ["a\n\nHuman: And?\n\nAssistant: c", "b"],
        [[1, 2]],
    ),
    "preference": ({"prompt": "Q", "chosen": "a", "rejected": "b"}, ["a", "b"], [[1, 2]]),
    "messages": (
        {
            "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}],
        },
        ["a", "b"],
        [[1, 2]],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ["a", "b"],
        [[1, 2]],
    ),
    "ranking": ({"prompt": "Q", "answers": ["a", "b", "c"], "ranks": [5, 2, 5]}, ["a", "b", "c"], [[2, 1, 2]]),
    "no ranks": ({"prompt": "Q", "answers": ["a", "b"]}, ["a", "b"], []),
    "argilla 2": (
        {
            "fields": {"instruction": "Q", "response-1": "a", "response-2": "b"},
            "responses": {"preference": [{"value": ["response-2", "response-1"], "user_id": "u1"}]},
        },
        ["a", "b"],
        [[2, 1]],
    ),
    "argilla 1": (
        {
            "fields": {"prompt": "Q", "response-1": "a", "response-2": "b"},
            "responses": [
                {
                    "user_id": "u1",
                    "status": "submitted",
                    "values": {
                        "r": {"value": [{"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 1}]}
                    },
                },
                {"user_id": "u2", "status": "discarded", "values": {}},
            ],
        },
        ["a", "b"],
        [[1, 1]],
    ),
    "label studio pairwise": (
        {
            "data": {"prompt": "Q", "answer1": "a", "answer2": "b"},
            "annotations": [
                {"completed_by": 7, "lead_time": 3.5, "result": [{"type": "pairwise", "value": {"selected": "right"}}]},
                {"completed_by": 8, "was_cancelled": True, "result": []},
            ],
        },
        ["a", "b"],
        [[2, 1]],
    ),
    "label studio ranker": (
        {
            "data": {"prompt": "Q", "items": [{"id": "x", "body": "a"}, {"id": "y", "body": "b"}]},
            "annotations": [{"completed_by": 7, "result": [{"type": "ranker", "value": {"ranker": ["y", "x"]}}]}],
        },
        ["a", "b"],
        [[2, 1]],
    ),
}


@pytest.mark.parametrize("kind", COMPARISONS)
def test_comparisons_of_others_are_read(kind: str) -> None:
    """Kills: chosen for rejected, right for left, ranks of a tie broken, a cancelled annotation that counts."""
    row, answers, said = COMPARISONS[kind]
    found = incoming(row, "rows.jsonl:1")
    assert [text for _, text in found.answers] == answers
    assert [one.ranks for one in found.said] == said
    assert found.messages[-1] == {"role": "user", "content": "And now?" if kind == "hh" else "Q"}
    assert len(found.messages) == (3 if kind == "hh" else 1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "Q"}, r"of no kind of comparison"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "one conversation"),
        ({"prompt": "Q", "answers": ["a"]}, "there are 1 answers"),
        ({"prompt": "Q", "answers": ["a", "b"], "ranks": [1]}, "2 answers and 1 ranks"),
        ({"prompt": "Q", "answers": ["a", "b"], "ranks": [1, True]}, "whole number"),
        ({"prompt": "Q", "chosen": 1, "rejected": "b"}, "text is needed"),
    ],
)
def test_a_row_that_is_no_comparison_is_named(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        incoming(row, "rows.jsonl:3")
    assert caught.value.where == "rows.jsonl:3"
