"""The page in a real browser: people judge by keyboard and mouse, leave and come back, and hostile texts stay texts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comparing import filled, served
from hostile import HOSTILE

from tunesmith.compare.store import Store, Written
from tunesmith.compare.tables import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIVE = "script, img, iframe, svg, a, form, input, style, link, meta, object, base, video, math"
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


def at(page: Any, done: int) -> None:
    """Waits until so many judgements are acknowledged."""
    page.locator("#count", has_text=f"{done} of").wait_for(timeout=20_000)


def test_forty_pairs_by_keyboard_and_mouse_with_a_reload_in_the_middle(browser: Any, tmp_path: Path) -> None:
    """Kills: a key that does another thing than its button, a reload that loses a comment or skips a prompt, an undo
    that forgets, a second judgement by a double click."""
    store = filled(tmp_path / "c", 40)
    with served(tmp_path / "c") as server:
        page = browser.new_page()
        page.goto(server.links["you"])
        wanted: list[tuple[str, list[int]]] = []
        ways = [
            (lambda: page.keyboard.press("1"), ("ranked", [1, 2])),
            (lambda: page.keyboard.press("ArrowRight"), ("ranked", [2, 1])),
            (lambda: page.keyboard.press("3"), ("ranked", [1, 1])),
            (lambda: page.keyboard.press("0"), ("bad", [1, 1])),
            (lambda: page.keyboard.press("s"), ("skip", [])),
            (lambda: page.click("#first"), ("ranked", [1, 2])),
            (lambda: page.click("#second", click_count=2, delay=120), ("ranked", [2, 1])),
            (lambda: page.click("#tie"), ("ranked", [1, 1])),
            (lambda: page.click("#bad"), ("bad", [1, 1])),
            (lambda: page.click("#skip"), ("skip", [])),
        ]
        at(page, 0)
        for number in range(40):
            if number == 20:
                page.keyboard.press("c")
                page.keyboard.type("1 and 2: not keys here")
                shown = page.inner_text("#prompt")
                page.reload()
                at(page, 20)
                assert page.inner_text("#prompt") == shown
                assert page.input_value("#comment") == "1 and 2: not keys here"
            if number == 30:
                page.keyboard.press("u")
                at(page, 29)
                wanted.pop()
                page.keyboard.press("2")
                at(page, 30)
                wanted.append(("ranked", [2, 1]))
            way, told = ways[number % len(ways)]
            way()
            wanted.append(told)
            at(page, number + 1)
        page.get_by_text("Nothing is left to judge").wait_for()
        page.close()
        judged = store.judged()[1]
    assert [(one.kind, list(one.ranks)) for one in judged] == wanted
    assert [one.comment for one in judged if one.comment] == ["1 and 2: not keys here"]
    assert all(0 < one.seconds < 60 for one in judged)


def test_four_answers_are_ranked_with_ties_by_keys_and_by_dragging(browser: Any, tmp_path: Path) -> None:
    """D > C > A = B, on a phone's screen, too. Kills: ranks that belong to other letters, a drag that drops nothing."""
    store = filled(tmp_path / "c", 2, answers=4)
    with served(tmp_path / "c") as server:
        page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
        page.goto(server.links["you"])
        at(page, 0)
        page.keyboard.press("Enter")
        page.get_by_text("every answer needs a place").wait_for()
        for key in "d1c2a3":
            page.keyboard.press(key)
        page.reload()  # what is half done is still there
        at(page, 0)
        assert page.locator('.tier[data-rank="1"] .chip').inner_text() == "D"
        for rank in (2, 4, 3):  # a tap on a letter and one on its place, and again elsewhere
            page.mouse.wheel(0, 5000)
            page.locator(".chip", has_text="B").tap()
            page.locator(f'.tier[data-rank="{rank}"]').tap(position={"x": 200, "y": 20})
            page.locator(f'.tier[data-rank="{rank}"] .chip', has_text="B").wait_for()
        page.keyboard.press("Enter")
        at(page, 1)
        for letter, rank in (("D", 1), ("C", 2), ("A", 4), ("B", 4)):
            page.mouse.wheel(0, 5000)  # to the end, where the buttons cover nothing
            page.wait_for_timeout(100)
            chip = page.locator(".chip", has_text=letter)
            start, end = chip.bounding_box(), page.locator(f'.tier[data-rank="{rank}"]').bounding_box()
            page.mouse.move(start["x"] + 10, start["y"] + 10)
            page.mouse.down()
            page.mouse.move(end["x"] + 200, end["y"] + 20, steps=4)
            page.mouse.up()
        page.click("#save")
        page.get_by_text("Nothing is left to judge").wait_for()
        page.close()
        judged = store.judged()[1]
    assert [one.ranks for one in judged] == [(3, 3, 2, 1), (3, 3, 2, 1)]


def test_two_annotators_at_once_share_what_is_to_be_judged(browser: Any, tmp_path: Path) -> None:
    """Kills: a prompt given to both where one judgement is wanted; drafts of one in the other's window."""
    store = filled(tmp_path / "c", 10)
    with served(tmp_path / "c", "--annotators", "ann,bob", "--overlap", "1") as server:
        context = browser.new_context()  # one browser for both
        pages = [context.new_page(), context.new_page()]
        for page, name in zip(pages, ("ann", "bob"), strict=True):
            page.goto(server.links[name])
            at(page, 0)
        for number in range(5):
            assert pages[0].inner_text("#prompt") != pages[1].inner_text("#prompt")
            for page in pages:
                page.keyboard.press("1")
            for page in pages:
                at(page, number + 1)
        for page in pages:
            page.get_by_text("Nothing is left to judge").wait_for()
        context.close()
        judged = store.judged()[1]
    assert sorted(one.prompt for one in judged) == list(range(1, 11))
    assert [sum(one.annotator == name for one in judged) for name in ("ann", "bob")] == [5, 5]


def test_a_judgement_is_sent_until_the_server_is_back(browser: Any, tmp_path: Path) -> None:
    """Kills: a page that goes on, or forgets, where the server is away."""
    from killing_judges import free_port

    store = filled(tmp_path / "c", 3)
    with served(tmp_path / "c", "--port", str(free_port())) as server:
        page = browser.new_page()
        page.goto(server.links["you"])
        at(page, 0)
        server.kill()
        page.keyboard.press("1")
        page.get_by_text("not saved yet, trying again").wait_for()
        assert store.judged()[1] == []
        server.start()
        at(page, 1)
        page.close()
    assert [one.ranks for one in store.judged()[1]] == [(1, 2)]


def test_fifty_hostile_texts_stay_texts(browser: Any, tmp_path: Path) -> None:
    """As prompts, answers, comments and names of systems, on the page and on the statistics. Nothing is executed,
    loaded or followed. Kills: an answer that is read as HTML, a link that leads away, a hidden sign."""
    assert len(HOSTILE) == 50
    (tmp_path / "c").mkdir()
    store = Store(connect(f"sqlite:///{tmp_path / 'c' / 'compare.sqlite'}"))
    numbers = store.add_prompts([[{"role": "user", "content": text}] for text in HOSTILE])
    store.add_answers([Written(one, HOSTILE[2], 1, text) for one, text in zip(numbers, HOSTILE, strict=True)])
    store.add_answers([Written(one, "plain", 1, "plain") for one in numbers])
    with served(tmp_path / "c") as server:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: asked.append("dialog"))
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(server.links["you"])
        for number in range(50):
            at(page, number)
            assert page.locator(f":is(#prompt, #answers) :is({LIVE})").count() == 0, HOSTILE[number][:60]
            if "<script>" in HOSTILE[number] and number < 1:
                assert HOSTILE[number] in page.inner_text("#prompt")
            words = page.inner_text("#answers")
            assert not set(words) & set("\u202e\u2066\u200b\ufeff\x1b\x00\x07" + chr(0xE0000 + ord("c")))
            page.fill("#comment", HOSTILE[number].replace("\0", "")[:500])
            page.click("#first")
        page.get_by_text("Nothing is left to judge").wait_for()
        own = server.links["you"]
        page.goto(server.statistics)
        page.get_by_text("50 judgements of 50 prompts").wait_for()
        assert page.locator("main img, main script, main a").count() == 0
        page.close()
    allowed = {own + end for end in ("", "page.js", "page.css", "next", "judge")} | {server.statistics}
    assert {url for url in asked if not url.endswith("/favicon.ico")} == allowed
    assert [one for one in problems if "favicon" not in one and "404" not in one] == []
