"""The report shows every part that a run folder holds, stands alone, and treats model output as hostile."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from report_runs import HOSTILE, Page, metric, records, run, write_run

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.evaluate.report import write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "toolcall-lora")


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def test_the_page_is_one_well_formed_file_that_names_no_address(folder: Path):
    """Kills: a style sheet, font, script or picture from elsewhere."""
    source = write_report(folder).read_text("utf-8")
    page = Page(source)
    assert page.open == []
    assert not re.search(r"(?i)https?:|//[a-z0-9-]+\.|url\(|@import", source)
    loading = {"src", "srcset", "href", "action", "background", "data", "poster", "xlink:href", "style"}
    assert not [tag for tag, attributes in page.tags if loading & set(attributes)]


def test_hostile_text_stays_text(folder: Path):
    """Kills: a `safe` filter on model output; joining strings into Markup without escaping."""
    page = page_of(folder)
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "input", "a"}
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_hostile_names_stay_text_everywhere(tmp_path: Path):
    """Model names, metrics, data names, reasons and config values come from outside, too."""
    (tmp_path / "config.yaml").write_text(f"model: {json.dumps(HOSTILE)}\nmethod: {{kind: {json.dumps(HOSTILE)}}}\n")
    row = {"step": 1, "loss": 2.0, f"eval_{HOSTILE}": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({**row, "step": step}) + "\n" for step in (1, 2)))
    value = {"value": 1.0, "low": 0.5, "high": 2.0, "n": HOSTILE, "signature": HOSTILE}
    models = [{"name": name + HOSTILE, "metrics": {HOSTILE: {**value, "n": 3}}} for name in ("base", "tuned")]
    (tmp_path / "eval.json").write_text(json.dumps({"models": models}))
    data = {HOSTILE: {"rows": 1, "dropped": {HOSTILE: 1}, HOSTILE: HOSTILE, "lengths": {HOSTILE: 2}}}
    facts = {"status": HOSTILE, "data": data, "versions": {HOSTILE: HOSTILE}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    page = page_of(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>") >= 8


def test_the_policy_lets_in_this_style_and_nothing_else(folder: Path):
    """Kills: 'unsafe-inline'; a hash of other bytes than the page's."""
    import base64
    import hashlib

    source = write_report(folder).read_text("utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', source)[1])
    style = re.search(r"<style>(.*?)</style>", source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy


def test_control_characters_and_broken_unicode_are_shown_not_written(folder: Path):
    raw = write_report(folder).read_bytes()
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", raw)
    text = raw.decode("utf-8")
    assert "\u2400" in text
    assert "\u202e" not in text
    assert "[U+202E]" in text


def test_every_part_of_a_full_run_is_on_the_page(folder: Path):
    page = page_of(folder)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert ids == {"scores", "training", "samples", "plan", "data", "next", "how"}
    for words in (
        "exact match",
        "untuned, 3-shot",
        "copy of the prompt",
        "70.0 to 86.0",
        "Learning rate",
        "Held-out F1",
        "as the reference",
        "no room for the answer",
        "supervised share",
        "activations",
        "Some CPU",
        "schedule: cosine",
        "tunesmith export",
    ):
        assert words in page.text, words
    assert "9 min 1 s" in page.text
    assert "6 more" in page.text


def test_the_headline_says_what_and_how_much_and_whether_it_may_be_chance(folder: Path):
    text = page_of(folder).text
    assert "smollm2-135m tuned with LoRA on toolcall-demo: exact match went from 2.0 to 78.0 on 100" in text
    assert "this is not chance" in text
    assert "The best alternative, untuned, 3-shot, is behind at 31.0" in text


@pytest.mark.parametrize(
    ("after", "says"),
    [(metric(31, 3), "this is not"), (metric(21, 3), "may be chance"), (metric(11, 1), "not help")],
)
def test_the_headline_never_claims_more_than_the_intervals_do(tmp_path: Path, after: dict, says: str):
    """Kills: calling any rise a gain."""
    models = [
        {"name": "base", "metrics": {"bleu": metric(20, 3)}},
        {"name": "tuned", "metrics": {"bleu": after}},
    ]
    (tmp_path / "eval.json").write_text(json.dumps({"models": models}))
    assert says in page_of(tmp_path).text


def test_a_lower_loss_is_a_gain(tmp_path: Path):
    """Kills: taking the larger number for the better one."""
    models = [
        {"name": "base", "metrics": {"loss": metric(3, 0.1)}},
        {"name": "tuned", "metrics": {"loss": metric(1, 0.1)}},
    ]
    (tmp_path / "eval.json").write_text(json.dumps({"models": models}))
    assert "this is not chance" in page_of(tmp_path).text


def test_a_run_with_nothing_but_its_log_has_its_curves(tmp_path: Path):
    lines = [json.dumps(record) for record in records(30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 31, "lo']))
    page = page_of(tmp_path)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert ids == {"training", "next"}
    assert "its training loss went from" in page.text
    assert "1 unfinished or damaged line" in page.text
    assert "--resume" in page.text


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "eval.json", "plan.json", "run.json"]
)
def test_any_file_may_be_missing(folder: Path, name: str):
    (folder / name).unlink()
    assert page_of(folder).open == []


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "eval.json", "plan.json", "run.json"]
)
def test_any_file_may_be_the_only_one(tmp_path: Path, folder: Path, name: str):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / name).write_bytes((folder / name).read_bytes())
    assert page_of(alone).open == []


def test_a_log_without_finite_values_is_no_failure(tmp_path: Path):
    rows = [
        {"step": 1, "loss": None, "lr": 0.0},
        {"step": 2, "loss": "nan", "eval_f1": True},
        {"step": 3, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert page_of(tmp_path).open == []


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing of a run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no such run folder"):
        write_report(tmp_path / "elsewhere")


def test_a_damaged_file_is_named_not_ignored(folder: Path):
    (folder / "eval.json").write_text('{"models": [')
    with pytest.raises(DataError, match=r"eval\.json"):
        write_report(folder)


def test_the_same_run_gives_the_same_page(folder: Path):
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_curves_say_in_words_what_they_show(folder: Path):
    """A reader without eyes gets the ends of each curve, and the numbers as a table."""
    page = page_of(folder)
    labels = [
        attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes
    ]
    assert any(label.startswith("Loss: loss from 2.") and "at step 120" in label for label in labels)
    assert "The same as numbers" in page.text


def test_lengths_are_in_order_whatever_order_the_file_has(folder: Path):
    """Kills: taking the keys as JSON sorts them, 1024 before 64."""
    facts = run()
    facts["data"]["train"]["lengths"] = {"1024": 1, "128": 2, "64": 3}
    (folder / "run.json").write_text(json.dumps(facts))
    labels = [attributes.get("aria-label") or "" for tag, attributes in page_of(folder).tags if tag == "svg"]
    assert "rows by tokens: \u2264 64 3, \u2264 128 2, \u2264 1024 1" in labels
