"""The page's server: whom it answers, what it refuses, and that what it acknowledged is kept."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparing import Served, ask, filled, judgement, served
from killing_judges import run

from tunesmith.cli.main import main

KEY = "a key of more than sixteen characters"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    filled(folder, 30)
    with served(folder, "--annotators", "ann,bob", "--overlap", "2", environment={"TUNESMITH_COMPARE_KEY": KEY}) as one:
        yield one


def item_of(link: str) -> int:
    status, text = ask(link + "next", {})
    assert status == 200, text
    return int(json.loads(text)["item"])


def test_nothing_opens_without_its_key(page: Served) -> None:
    """Every route, with a wrong token, another's, or none; each the same answer. Kills: a route that forgot to ask."""
    base = page.statistics.split("/s/")[0]
    ann, bob = (page.links[name].rstrip("/").rsplit("/", 1)[1] for name in ("ann", "bob"))
    wrong = [f"/a/ann/{bob}/", f"/a/bob/{ann}/", "/a/ann/x/", f"/a/eve/{ann}/", f"/a/ANN/{ann}/", f"/a/ann%2f/{ann}/"]
    paths = [f"{start}{end}" for start in wrong for end in ("", "page.js", "page.css", "page.html")]
    paths += [
        "/",
        "/a/",
        "/s/",
        "/s/x/",
        f"/s/{ann}/",
        "/page.js",
        "/docs",
        "/openapi.json",
        "/../compare.sqlite",
        "/secret",
    ]
    assert {ask(base + path) for path in paths} == {(404, "nothing here")}
    posts = [f"{start}{act}" for start in wrong for act in ("next", "judge", "undo")]
    assert {ask(base + path, judgement(1, [1, 2])) for path in posts} == {(404, "nothing here")}
    assert ask(page.links["ann"])[0] == ask(page.links["ann"] + "page.js")[0] == ask(page.statistics)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1"}, 421),
    ],
)
def test_a_post_of_another_site_is_refused(page: Served, headers: dict[str, str], status: int) -> None:
    """Although it has the link. Kills: an origin that is not asked for, a host that anyone may claim."""
    item = item_of(page.links["ann"])
    assert ask(page.links["ann"] + "judge", judgement(item, [1, 2]), headers)[0] == status
    assert item_of(page.links["ann"]) == item


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_reading_and_posting_exist(page: Served, method: str) -> None:
    assert ask(page.links["ann"] + "judge", judgement(1, [1, 2]), method=method)[0] == 405


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"\xff", b'{"item": 1, "item": 2}', b"[" * 5000,
        {"kind": "ranked"}, {"item": 10**6}, {"ranks": [1]}, {"ranks": [0, 1]}, {"ranks": [1, 3]}, {"ranks": None},
        {"ranks": [True, 1]}, {"kind": "best"}, {"client": ""}, {"comment": "\0"}, {"seconds": -1}, {"seconds": "1"},
        {"scores": {"wit": [1, 2]}}, {"more": 1}, b'{"seconds": NaN}',
    ],
)  # fmt: skip
def test_what_is_no_judgement_is_refused_and_changes_nothing(page: Served, body: object) -> None:
    """Kills: an answer of 500, a rank out of range, half of a surrogate pair that no database keeps."""
    item = item_of(page.links["ann"])
    sent = body if isinstance(body, bytes) else {**judgement(item, [1, 2]), **body}  # type: ignore[dict-item]
    if body == {"kind": "ranked"}:
        sent = body
    status, text = ask(page.links["ann"] + "judge", sent)
    assert status == 400, text
    assert item_of(page.links["ann"]) == item


def test_half_of_a_surrogate_pair_and_a_large_body_are_refused(page: Served) -> None:
    item = item_of(page.links["ann"])
    raw = json.dumps(judgement(item, [1, 2], comment="?")).replace('"?"', '"\\ud800"').encode()
    assert ask(page.links["ann"] + "judge", raw)[0] == 400
    assert ask(page.links["ann"] + "judge", b"x" * 300_000)[0] == 413
    assert item_of(page.links["ann"]) == item


def test_a_judgement_sent_again_is_one_and_another_with_its_name_is_refused(page: Served) -> None:
    """Kills: a retry that counts twice; a changed judgement that passes for the first."""
    link = page.links["bob"]
    sent = judgement(item_of(link), [1, 2])
    first, again = ask(link + "judge", sent), ask(link + "judge", sent)
    assert first[0] == again[0] == 200
    assert json.loads(first[1])["done"] == json.loads(again[1])["done"] == 1
    assert ask(link + "judge", {**sent, "ranks": [2, 1]})[0] == 409
    assert ask(link + "judge", {**judgement(sent["item"], [2, 1])})[0] == 409
    assert ask(page.links["ann"] + "judge", sent)[0] == 409
    undo = {"client": "undo-of-bob", "judgement": sent["client"]}
    for _ in range(2):
        status, text = ask(link + "undo", undo)
        assert (status, json.loads(text)["item"], json.loads(text)["done"]) == (200, sent["item"], 0)
    assert ask(page.links["ann"] + "undo", {"client": "undo-of-ann", "judgement": sent["client"]})[0] == 409


def test_answers_are_shown_without_their_authors(page: Served) -> None:
    """Kills: a system's name in what the page gets (here in the texts alone), the same side for everyone."""
    sides = set()
    for _ in range(8):
        turn = json.loads(ask(page.links["ann"] + "next", {})[1])
        assert set(turn) == {"item", "messages", "answers", "waiting", "done", "left", "last", "rubric", "most"}
        assert sorted(map(str, turn["answers"])) == [
            str([["p", [f"Answer of {one} to {turn['item']}"]]]) for one in "AB"
        ]
        sides.add(str(turn["answers"][0]).split()[3])
        ask(page.links["ann"] + "judge", judgement(turn["item"], [1, 1]))
    assert len(sides) == 2


def test_every_answer_has_a_strict_policy(page: Served) -> None:
    """Kills: a policy that lets anything in from elsewhere, or a script that stands in the page."""
    import urllib.request

    for link in (page.links["ann"], page.links["ann"] + "page.js", page.statistics):
        with urllib.request.urlopen(link) as reply:
            policy = dict(
                part.strip().partition(" ")[::2] for part in reply.headers["Content-Security-Policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy.get("script-src", "'self'") == "'self'"
            assert "unsafe" not in str(policy)
            assert policy["frame-ancestors"] == "'none'"
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Referrer-Policy"] == "no-referrer"
            assert reply.headers["Cache-Control"] == "no-store"
            assert reply.headers["Set-Cookie"] is None


def test_headers_that_never_end_take_nobody_elses_place(page: Served) -> None:
    """Kills: a header without a limit; 100 half-open connections that stop everyone."""
    host, port = page.statistics.split("/")[2].split(":")
    waiting = [socket.create_connection((host, int(port))) for _ in range(100)]
    for one in waiting:
        one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX: ")
    assert ask(page.links["ann"] + "next", {})[0] == 200
    waiting[0].sendall(b"x" * 100_000)
    assert waiting[0].recv(1000).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    for one in waiting:
        one.close()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (None, "error: --host: 0.0.0.0 can be reached by others, and there is no key"),
        (KEY, "error: --host: 0.0.0.0 is every address of this machine; under which do people open the page?"),
        ("short", "error: TUNESMITH_COMPARE_KEY: has 5 characters; a key has at least 16"),
    ],
)
def test_another_address_needs_a_key_and_a_name(
    key: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: a page that everyone in the network can open."""
    filled(tmp_path / "c", 1)
    monkeypatch.delenv("TUNESMITH_COMPARE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("TUNESMITH_COMPARE_KEY", key)
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "c"), "--host", "0.0.0.0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(told)


def test_a_key_makes_other_links_and_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    """And SIGTERM ends it with 75. Kills: a token that does not depend on the key; a secret that everyone can read."""
    filled(tmp_path / "c", 1)
    with served(tmp_path / "c") as one:
        assert (tmp_path / "c" / "secret").stat().st_mode & 0o77 == 0
        with pytest.raises(SystemExit) as busy:  # one process a folder
            main(["compare", str(tmp_path / "c"), "--port", "0"])
        assert busy.value.code == 7
        assert one.stop() == 75
    paths = ["/".join(one.links["you"].split("/")[3:])]
    for environment in ({}, {"TUNESMITH_COMPARE_KEY": KEY}):
        with served(tmp_path / "c", environment=environment) as again:
            paths.append("/".join(again.links["you"].split("/")[3:]))
    assert paths[0] == paths[1] != paths[2]


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_server_that_is_killed(tmp_path: Path) -> None:
    """A small `tests/killing_judges.py`. Kills: an answer before the commit, a retry that counts twice."""
    found = run(tmp_path / "c", people=4, prompts=40, kills=2, overlap=2, seconds=120.0)
    assert found["acknowledged"] > 80 - 4
    assert {found[name] for name in ("lost", "never sent", "double", "changed", "undo lost or invented")} == {0}
