"""What a comparison holds and gives: turns, imported and exported rows, sampled answers, what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from comparing import filled, judgement
from fault_cases import run_here
from row_files import lines
from test_compare_incoming import COMPARISONS, HH
from tiny_folders import tiny_folder

from tunesmith.compare.shown import shown
from tunesmith.compare.store import Store, Written
from tunesmith.compare.tables import connect
from tunesmith.compare.turns import HELD_SECONDS, Conflict, Sent, Turns
from tunesmith.core.errors import ConfigError
from tunesmith.run.comparison import Sampling, open_store, open_writers, sample


def sent(item: int | None, given: list[int] | None = None, **more: Any) -> Sent:
    assert item is not None
    return Sent.model_validate(judgement(item, given or [1, 2], **more))


# turns


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Four prompts; in PostgreSQL where $TUNESMITH_TEST_POSTGRESQL names an empty database to write into."""
    if request.param == "sqlite":
        return filled(tmp_path / "c", 4)
    url = os.environ.get("TUNESMITH_TEST_POSTGRESQL")
    if url is None:
        pytest.skip("TUNESMITH_TEST_POSTGRESQL names no database")
    from tunesmith.compare.tables import tables

    tables.drop_all(connect(url))
    return filled(tmp_path / "c", 4, url=url)


def test_each_prompt_is_judged_by_as_many_as_wanted_and_by_nobody_twice(store: Store) -> None:
    """Also where they look at once, skip, take back, or leave. Kills: overlap counted with skips or without those who
    are looking; a prompt held for ever by somebody who left."""
    for name in ("ann", "bob", "eve"):
        store.add_annotator(name)
    turns = Turns(store, overlap=2)
    seen = [turns.next(name, now=0.0).item for name in ("ann", "bob", "eve")]
    assert seen == [1, 1, 2]
    assert turns.next("ann", now=1.0).item == 1  # asked again, the same
    turns.judge("ann", sent(1))
    assert turns.next("eve", now=2.0).item == 2
    turns.judge("bob", sent(1, None, kind="skip"))
    assert turns.next("eve", now=3.0).item == 2  # what she sees stays
    turns.judge("eve", sent(2))
    assert turns.next("eve", now=4.0).item == 1  # one judgement and a skip are one judgement
    turns.judge("eve", sent(1))
    for name, item in (("ann", 2), ("ann", 3), ("eve", 3), ("bob", 4)):
        turns.judge(name, sent(item))
    assert turns.next("ann", now=5.0).item == 4
    late = turns.next("eve", now=6.0)
    assert (late.item, late.waiting, late.left) == (None, True, 1)
    assert turns.next("eve", now=7.0 + HELD_SECONDS).item == 4  # ann has left


def test_taking_back_is_a_row_and_shows_the_prompt_again(store: Store) -> None:
    """Kills: an update in place of a row; a second judgement that stands beside the first."""
    store.add_annotator("ann")
    turns = Turns(store, overlap=1, rubric=("wit",))
    first = sent(turns.next("ann").item, [1, 2], comment="no")
    turns.judge("ann", first)
    turns.judge("ann", first)
    with pytest.raises(Conflict):
        turns.judge("ann", sent(first.item, [2, 1]))
    assert turns.next("ann").last == first.client
    turns.undo("ann", "undo-one", first.client)
    again = turns.next("ann")
    assert (again.item, again.done, again.last) == (first.item, 0, None)
    second = sent(first.item, [2, 1], scores={"wit": [None, 5]})
    turns.judge("ann", second)
    turns.judge("ann", first)  # a late repetition of what was taken back changes nothing
    [one] = store.judged()[1]
    assert (one.ranks, one.scores) == ((2, 1), {"wit": (None, 5)})


def test_many_at_once_cannot_judge_one_prompt_twice(store: Store) -> None:
    """Twelve threads send different judgements of the same prompt. Kills: a check outside of the transaction."""
    store.add_annotator("ann")
    turns = Turns(store, overlap=1)
    kept: list[bool] = []

    def one() -> None:
        try:
            turns.judge("ann", sent(1))
            kept.append(True)
        except Conflict:
            kept.append(False)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept) == [False] * 11 + [True]
    assert len(store.judged()[1]) == 1


def test_a_commit_reaches_the_disk(tmp_path: Path) -> None:
    """Kills: synchronous = NORMAL, under which a loss of power takes what was acknowledged."""
    with filled(tmp_path / "c", 1).reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "c", 1)
    store.begin({"seed": 1, "temperature": 0.5})
    store.begin({"seed": 1, "temperature": 0.5})
    with pytest.raises(ConfigError, match=r"seed is 1, not 2"):
        store.begin({"seed": 2, "temperature": 0.5})


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "postgresql+nodriver://u:geheim@h/d"])
def test_a_database_of_another_kind_is_told_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url)
    assert caught.value.where == "--database"
    assert "geheim" not in str(caught.value)


# rows in and out


def test_imported_comparisons_come_out_as_rows_and_importing_again_adds_nothing(tmp_path: Path) -> None:
    """By the command. Kills: an export that turns a preference round, a tie that becomes one, judgements twice."""
    rows = [COMPARISONS[kind][0] for kind in ("hh", "ranking", "no ranks")]
    rows[2] = {"prompt": "Other", "answers": ["a", "b"]}
    rows += [{**rows[0], "chosen": f"{HH} Goodbye."}, rows[0]]  # another answer to a question, and a row that is there
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    folder = tmp_path / "c"
    for _ in range(2):
        done = run_here(f"compare --import {tmp_path / 'rows.jsonl'} --out {folder} --no-serve")
        assert done["code"] == 0, done["err"]
    assert "4 prompts, 3 judgements" in done["err"]
    done = run_here(f"compare {folder} --export {tmp_path / 'out.jsonl'} --as preference --json")
    assert json.loads(done["out"]) == {
        "rows": 4, "format": "preference", "left_out": {"skipped": 0, "all bad": 0, "ties": 1}
    }  # fmt: skip
    pairs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert pairs[0]["prompt"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And now?"},
    ]
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("Bye.", "What")
    rest = sorted((row["chosen"], row["rejected"]) for row in pairs[1:])
    assert rest == [("Goodbye.", "What"), ("b", "a"), ("b", "c")]
    assert run_here(f"compare {folder} --export {tmp_path / 'out.jsonl'}")["code"] == 0
    ranked = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][1]
    assert dict(zip(ranked["answers"], ranked["ranks"], strict=True)) == {"a": 2, "b": 1, "c": 2}
    told = run_here(f"report {folder}")
    assert told["code"] == 0
    assert "3 judgements of 3 prompts by 1 annotators" in told["out"]
    assert "chosen against rejected" in (folder / "report.html").read_text()


def test_a_report_of_a_run_is_its_page_and_neither_report_needs_torch(tmp_path: Path) -> None:
    """In a process of its own. Kills: a database asked for a run's page, a model's libraries to look at figures."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    filled(tmp_path / "c", 1)
    code = (
        "import sys; from fault_cases import run_here\n"
        "for folder in sys.argv[1:]: found = run_here(f'report {folder}'); print(found['code'], found['heavy'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "c")]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.stdout.splitlines() == ["0 []", "0 []"], done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert "0 judgements of 0 prompts" in (tmp_path / "c" / "report.html").read_text()


# answers


def test_sampling_that_was_stopped_goes_on_with_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiny models, two answers each, at a temperature. Kills: a seed that depends on how far it had come."""
    monkeypatch.setattr("tunesmith.run.comparison.CHUNK", 2)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    models = [str(tiny_folder(tmp_path / name)) for name in ("one", "two")]
    sampling = Sampling(samples=2, max_tokens=5, temperature=1.0, seed=3, template="plain")
    prompts = [[{"role": "user", "content": f"Question {place}"}] for place in range(5)]

    def begun(name: str) -> Store:
        (tmp_path / name).mkdir()
        store = open_store(tmp_path / name, None)
        store.add_prompts(prompts)
        return store

    whole, stopped = begun("whole"), begun("stopped")
    sample(whole, open_writers(models, "plain"), sampling)
    add = Store.add_answers

    def fails(store: Store, found: list[Written]) -> None:
        if len([one for item in store.items() for one in item.answers]) >= 7:
            raise KeyboardInterrupt
        add(store, found)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_answers", fails)
        with pytest.raises(KeyboardInterrupt):
            sample(stopped, open_writers(models, "plain"), sampling)
    assert 0 < sum(len(item.answers) for item in stopped.items()) < 20
    sample(stopped, open_writers(models, "plain"), sampling)

    def texts(store: Store) -> set[tuple[int, str, int, str]]:
        return {(item.id, one.system, one.sample, one.text) for item in store.items() for one in item.answers}

    assert texts(stopped) == texts(whole)
    assert len(texts(whole)) == 20
    first = [one.text for one in whole.items()[0].answers if one.system == models[0]]
    assert first[0] != first[1]


class Answering(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says what it was asked, and at first that it is busy."""

    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**body, "key": self.headers["Authorization"], "path": self.path})
        self.send_response(503 if len(self.asked) == 1 else 200)
        self.end_headers()
        said = {"choices": [{"message": {"content": f"You said: {body['messages'][-1]['content']}"}}]}
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_a_model_behind_a_server_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, beside a file of prompts. Kills: a key in what is kept, the same seed for every prompt."""
    server = HTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setattr("time.sleep", lambda _: None)
    (tmp_path / "p.jsonl").write_text(lines([{"prompt": "One?"}, {"prompt": "Two?"}]))
    base = f"http://127.0.0.1:{server.server_port}/v1"
    out = tmp_path / "c"
    done = run_here(f"compare m1@{base} m2@{base} --prompts {tmp_path / 'p.jsonl'} --out {out} --no-serve")
    server.shutdown()
    assert done["code"] == 0, done["err"]
    texts = [[one.text for one in item.answers] for item in open_store(out, None).items()]
    assert texts == [["You said: One?"] * 2, ["You said: Two?"] * 2]
    asked = Answering.asked[1:]
    assert {one["path"] for one in asked} == {"/v1/chat/completions"}
    assert {one["key"] for one in asked} == {"Bearer sk-canary"}
    assert [one["model"] for one in asked] == ["m1", "m1", "m2", "m2"]
    assert asked[0]["seed"] == asked[2]["seed"] != asked[1]["seed"]
    assert "sk-canary" not in done["err"]
    assert all(b"sk-canary" not in path.read_bytes() for path in out.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("compare nothing-here", 2, "no prompts to ask"),
        ("compare --prompts p.jsonl", 2, "nobody answers them"),
        ("compare", 2, "there is no comparison here"),
        ("compare x --export y --as pairs", 2, "neither preference nor ranking"),
        ("compare nothing-here x --prompts p.jsonl", 4, "nothing-here"),
        ("compare --import missing.jsonl", 3, "not found"),
        ("compare --import p.jsonl", 3, "of no kind of comparison"),
        ("compare a b --prompts p.jsonl --out p.jsonl/x", 5, "a file is in the way"),
        ("report nothing-here", 2, "no such run folder"),
    ],
)
def test_what_cannot_be_compared_is_told(
    words: str, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Q"}\n')
    done = run_here(words)
    assert done["code"] == code
    assert told in done["err"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


# what is shown


def test_markdown_becomes_elements_of_a_fixed_set() -> None:
    """Kills: raw HTML let through, a link that leads somewhere, a picture that is loaded."""
    assert shown("**a** `b`\nc") == [["p", [["strong", ["a"]], " ", ["code", ["b"]], "\n", "c"]]]
    assert shown("```py\n<b>\n```") == [["pre", [["code", ["<b>\n"]]]]]
    assert shown("<b>x</b>") == [["p", ["<b>x</b>"]]]
    assert shown("[x](https://e.org) ![y](z.png)") == [["p", ["x", " (https://e.org)", " ", "[picture: y] (z.png)"]]]
    assert shown("- a\n- b") == [["ul", [["li", ["a"]], ["li", ["b"]]]]]
    assert shown("a\u202eb\x1b") == [["p", ["a[U+202E]b\u241b"]]]
