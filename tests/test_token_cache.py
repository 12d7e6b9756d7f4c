"""Rows kept as tokens: what is read is what was encoded, and nothing wrong is ever read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_cases import alpaca, config, run_here
from tiny import tiny_tokenizer_folder
from tiny_encoders import wordpiece_folder
from tiny_folders import tiny_folder

from tunesmith.core.errors import DataError
from tunesmith.core.problem import Problem, ProblemKind
from tunesmith.data import dataset as dataset_module
from tunesmith.data import token_cache, token_file
from tunesmith.data.codec import Codec
from tunesmith.data.dataset import Dataset, open_data
from tunesmith.data.encode import Dropped, Example
from tunesmith.data.labels import find_labels
from tunesmith.data.section import DataSection
from tunesmith.data.statistics import DataStatistics

CHATS = [
    {"instruction": "Hi <|im_end|>", "output": "Hello 你好."},
    {"instruction": "one two three " * 30, "output": "Red."},
    {"instruction": "Hi", "output": "blue white and red " * 30},
    *({"instruction": f"Say {number}.", "output": f"{number} it is"} for number in range(40)),
]
BARE = [{"prompt": f"The number {number} is", "completion": " odd."} for number in range(9)]
TEXTS = [{"text": "running text " * number} for number in range(1, 9)]
CLASSES = [
    {"text": f"the film {number} " * number, "text_pair": "good", "label": "ab"[number % 2]} for number in range(9)
]
SCORES = [{"text": f"film {number}", "label": number / 2} for number in range(9)]
WORDS = [{"tokens": ["the", "film"] * number, "labels": ["D", "N"] * number} for number in range(1, 20)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in which small sets are kept, too."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset_module, "FEW_ROWS", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("chatml"))


def opened(path: Path, tokenizer: Path, rows: list[Any], kind: ProblemKind | None = None, **settings: Any) -> Dataset:
    file = path / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    section = DataSection(**{"train": str(file), "max_length": 60, **settings})
    found = open_data(section.train, section, Codec.open(tokenizer))
    if kind is not None:
        found.problem = find_labels(found.rows(), kind)
    return found


def all_of(data: Dataset) -> list[Example | Dropped]:
    return [data.example(*place) for place in data.places()]


def plain(
    path: Path, tokenizer: Path, rows: list[Any], kind: ProblemKind | None = None, **settings: Any
) -> tuple[Any, Any]:
    """What a dataset comes to that keeps nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "FEW_ROWS", 10**9)
        data = opened(path, tokenizer, rows, kind, **settings)
        return data.check(), all_of(data)


def never(*_: Any) -> Any:
    raise AssertionError("a row was encoded again")


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (CHATS, None),
        (BARE, None),
        (TEXTS, None),
        (CLASSES, "classification"),
        (SCORES, "regression"),
        (WORDS, "tokens"),
    ],
    ids=["chats", "bare", "texts", "classes", "scores", "words"],
)
def test_what_is_read_is_what_was_encoded(
    rows: list[Any], kind: ProblemKind | None, chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a field that is not kept; whole labels that come back as fractions; encoding all the same."""
    folder = wordpiece_folder(tmp_path / "bert") if kind else chatml
    statistics, wanted = plain(tmp_path, folder, rows, kind, max_length=30)
    assert any(isinstance(row, Example) for row in wanted)
    assert opened(tmp_path, folder, rows, kind, max_length=30).check() == statistics
    monkeypatch.setattr(Dataset, "_encoded", never)
    again = opened(tmp_path, folder, rows, kind, max_length=30)
    assert again.check() == statistics
    assert all_of(again) == wanted
    types = [[type(label) for label in row.labels] for row in wanted if isinstance(row, Example)]
    assert [[type(label) for label in row.labels] for row in all_of(again) if isinstance(row, Example)] == types


def test_rows_come_back_across_the_batches_of_a_file(
    chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: counting rows from the beginning of a batch; the last batch left out; pages given back too soon."""
    monkeypatch.setattr(token_file, "_BATCH_ROWS", 4)
    monkeypatch.setattr(token_file, "_GIVE_BACK_ROWS", 3)
    _, wanted = plain(tmp_path, chatml, CHATS)
    opened(tmp_path, chatml, CHATS).check()
    monkeypatch.setattr(Dataset, "_encoded", never)
    data = opened(tmp_path, chatml, CHATS)
    data.check()
    assert all_of(data)[::-1] == [data.example(*place) for place in reversed(list(data.places()))] == wanted[::-1]


def test_rows_that_are_wrong_are_told_again_and_skipped_again(chatml: Path, tmp_path: Path) -> None:
    """Kills: a file that was written while rows were skipped and hides what is wrong with them."""
    rows = [*CHATS[:5], '{"instruction": 5, "output": "x"}\n', "{\n", *CHATS[5:]]
    wanted = plain(tmp_path, chatml, rows, skip_bad_rows=True)
    for _ in range(2):
        data = opened(tmp_path, chatml, rows, skip_bad_rows=True)
        assert (data.check(), all_of(data)) == wanted
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:6(?s:.*)rows\.jsonl:7"):
            opened(tmp_path, chatml, rows).check()


def test_rows_beyond_those_that_a_check_encodes_are_kept_before_epochs(
    chatml: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: rows of the end that are taken for rows without tokens, or are encoded in every epoch."""
    monkeypatch.setattr(dataset_module, "ENCODED_ROWS", 10)
    statistics, wanted = plain(tmp_path, chatml, CHATS)
    assert statistics.examined == 10
    for _ in range(2):
        data = opened(tmp_path, chatml, CHATS)
        assert data.check() == statistics
        assert all_of(data) == wanted
    data.keep_all()
    monkeypatch.setattr(Dataset, "_encoded", never)
    data = opened(tmp_path, chatml, CHATS)
    data.check()
    data.keep_all()
    assert all_of(data) == wanted
    assert len(list(cache.iterdir())) == 2


def edit(name: str, old: str, new: str) -> Callable[[Path], dict[str, Any]]:
    def change(folder: Path) -> dict[str, Any]:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
        return {}

    return change


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "data": lambda folder: {"rows": [*CHATS[:-1], {**CHATS[-1], "output": "39 it iS"}]},
    "fewer rows": lambda folder: {"rows": CHATS[:-1]},
    "max_length": lambda folder: {"max_length": 61},
    "template": lambda folder: {"template": "alpaca"},
    "the model's template": edit("chat_template.jinja", "<|im_end|>\n", "<|im_end|>\n\n"),
    "tokenizer": edit("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
    "the names of tokens": edit("tokenizer_config.json", "<|im_end|>", "<|endoftext|>"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_decides_the_tokens_is_in_the_name(name: str, tmp_path: Path, cache: Path) -> None:
    """Kills: a key without one of them, so that a run learns from the rows of another."""
    folder = tiny_tokenizer_folder(tmp_path / "tokenizer")
    opened(tmp_path, folder, CHATS).check()
    opened(tmp_path, folder, CHATS).check()
    assert len(list(cache.iterdir())) == 1
    settings = {"rows": CHATS, **CHANGES[name](folder)}
    wanted = plain(tmp_path, folder, **settings)
    data = opened(tmp_path, folder, **settings)
    assert (data.check(), all_of(data)) == wanted
    assert len(list(cache.iterdir())) == 2


def test_code_problem_and_format_are_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a file of an older version that is read by a newer one."""
    facts = {"rows": "a", "problem": Problem("tokens", ("D", "N")).as_dict(), "format": "tagged"}
    names = {token_cache.key_of(facts)}
    names.add(token_cache.key_of({**facts, "problem": Problem("tokens", ("D", "N", "V")).as_dict()}))
    names.add(token_cache.key_of({**facts, "format": "text"}))
    monkeypatch.setattr(token_cache, "code_hash", lambda: "another version")
    names.add(token_cache.key_of(facts))
    assert len(names) == 4


def test_a_module_that_changed_changes_the_hash_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a list of modules that forgets one."""
    here = Path(token_cache.__file__).parents[1]
    for name in ("data", "core"):
        shutil.copytree(here / name, tmp_path / name)
    monkeypatch.setattr(token_cache, "__file__", str(tmp_path / "data" / "token_cache.py"))
    found = set()
    for name in ("", "data/encode.py", "data/chatml.jinja", "data/jinja.py", "core/problem.py", "core/files.py"):
        if name:
            with open(tmp_path / name, "a") as stream:
                stream.write("#")
        token_cache.code_hash.cache_clear()
        found.add(token_cache.code_hash())
    token_cache.code_hash.cache_clear()
    assert len(found) == 6


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("way", ["flipped", "cut off"])
def test_a_damaged_file_is_noticed_and_made_again(
    way: str, at: float, chatml: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kills: reading what is there without looking; an error in place of encoding again."""
    wanted = plain(tmp_path, chatml, CHATS)
    opened(tmp_path, chatml, CHATS).check()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    place = int((len(whole) - 1) * at)
    damaged = bytes([whole[place] ^ 1])
    file.write_bytes(whole[:place] + (damaged + whole[place + 1 :] if way == "flipped" else b""))
    data = opened(tmp_path, chatml, CHATS)
    assert (data.check(), all_of(data)) == wanted
    assert [record.message for record in caplog.records if "damaged" in record.message] == [caplog.records[0].message]
    assert len(caplog.records) == 1
    assert file.read_bytes() == whole


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 6])
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_read(
    calls: int, chatml: Path, tmp_path: Path, cache: Path
) -> None:
    """Kills: writing under the name that is read; a name that is there before its bytes are on the disk."""
    data = opened(tmp_path, chatml, CHATS)
    pid = os.fork()
    if pid == 0:
        kill_at(calls)
        data.check()
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert killed in (-signal.SIGKILL, 0)
    files = [path for path in cache.iterdir() if path.suffix == ".arrow"]
    assert all(len(token_file.TokenFile(path)) == len(CHATS) for path in files)
    wanted = plain(tmp_path, chatml, CHATS)
    data = opened(tmp_path, chatml, CHATS)
    assert (data.check(), all_of(data)) == wanted


def kill_at(number: int) -> None:
    """The process is killed before its n-th call that makes, completes or renames a file."""
    count = [0]

    def counted(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **rest)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (token_file.TokenWriter, "_flush"), (os, "utime")):
        setattr(owner, name, counted(getattr(owner, name)))
    token_file._BATCH_ROWS = 20


def test_a_folder_that_cannot_be_written_costs_one_line(
    chatml: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kills: a run that ends because what would make the next one faster cannot be kept."""
    wanted = plain(tmp_path, chatml, CHATS)
    cache.parent.write_text("no folder")
    data = opened(tmp_path, chatml, CHATS)
    assert (data.check(), all_of(data)) == wanted
    assert ["rows as tokens are not kept: " in record.message for record in caplog.records] == [True]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may have more than 3,000 bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_one_line_and_leaves_nothing(
    chatml: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    wanted = plain(tmp_path, chatml, CHATS)
    data = opened(tmp_path, chatml, CHATS)
    request.getfixturevalue("small_files")
    assert (data.check(), all_of(data)) == wanted
    assert ["rows as tokens are not kept" in record.message for record in caplog.records] == [True]
    assert list(cache.iterdir()) == []


def test_rows_beyond_the_limit_are_not_kept(
    chatml: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 5000)
    monkeypatch.setattr(token_file, "_BATCH_ROWS", 4)
    wanted = plain(tmp_path, chatml, CHATS)
    data = opened(tmp_path, chatml, CHATS)
    assert (data.check(), all_of(data)) == wanted
    assert len(caplog.records) == 1
    assert list(cache.iterdir()) == []


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a cache that grows for ever; removing what was just made, or what another process is writing."""
    ages = {"a.arrow": 500, "b.arrow": 400, "c.arrow": 300, ".d.tmp": 100, ".e.tmp": 10**6, "new.arrow": 600}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 350)
    token_cache.make_room(tmp_path / "new.arrow")
    assert {path.name for path in tmp_path.iterdir()} == {"c.arrow", ".d.tmp", "new.arrow"}


def test_use_counts_as_use(chatml: Path, tmp_path: Path, cache: Path) -> None:
    """Kills: removing by the time of writing what every run reads."""
    opened(tmp_path, chatml, CHATS).check()
    (file,) = cache.iterdir()
    os.utime(file, (0, 0))
    opened(tmp_path, chatml, CHATS).check()
    assert file.stat().st_mtime > time.time() - 100


def test_few_rows_are_not_kept(chatml: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: files and an import that cost more than they save."""
    monkeypatch.setattr(dataset_module, "FEW_ROWS", len(CHATS))
    assert isinstance(opened(tmp_path, chatml, CHATS).check(), DataStatistics)
    assert not cache.exists()


def outcome(run: Path) -> tuple[list[Any], bytes]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [[record[key] for key in ("step", "loss", "grad_norm", "lr", "tokens")] for record in records]
    return losses, (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_is_the_same_with_and_without_kept_rows_and_resumed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: rows in another order, or of another length, on one of the ways."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(alpaca(24)) + "\n")
    (tmp_path / "c.yaml").write_text(config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "FEW_ROWS", 10**9)
        assert run_here("tune c.yaml out=plain")["code"] == 0
    assert not cache.exists()
    assert run_here("tune c.yaml out=writes")["code"] == 0
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Dataset, "_encoded", never)
    assert run_here("tune c.yaml out=reads")["code"] == 0
    wanted = outcome(tmp_path / "plain")
    assert outcome(tmp_path / "writes") == outcome(tmp_path / "reads") == wanted
    facts = json.loads((tmp_path / "reads/run.json").read_text())
    (tmp_path / "reads/run.json").write_text(json.dumps({**facts, "status": "running"}))
    shutil.rmtree(tmp_path / "reads/adapter")
    shutil.rmtree(tmp_path / "reads/checkpoints/step-000004")
    assert run_here("tune c.yaml out=reads --resume")["code"] == 0
    assert outcome(tmp_path / "reads") == wanted
