"""The report shows every part that a run folder holds, stands alone, and treats model output as hostile."""

from __future__ import annotations

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.evaluate import plots
from tunesmith.evaluate.report import write_report

CONFIG = """\
model: smollm2-135m
data: {train: toolcall-demo, eval: 'toolcall-demo:test', max_length: 768}
method: {kind: lora, rank: 16, alpha: 32, targets: [q, k, v, o]}
train: {steps: 120, lr: 1.0e-3, schedule: cosine}
evaluate: {metrics: [exact_match, f1, loss]}
out: runs/toolcall
"""
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style></div></body>'
ALSO_HOSTILE = '" onmouseover="alert(3)" {{ 7 * 7 }} javascript:alert(4) &lt;b&gt; \u202e\x00\x1b[31m \ud800 -->]]>'


def metric(value: float, spread: float, **more: object) -> dict:
    return {"value": value, "low": value - spread, "high": value + spread, "n": 100, **more}


def scores() -> dict:
    signature = "exact_match: whitespace stripped | bootstrap: 1000 samples, seed 0, 95 %"
    rows = {
        "untuned, zero-shot": (2.0, 1.5, 11.2, 2.4, 2.61),
        "untuned, 3-shot": (31.0, 9.1, 52.7, 5.0, 1.32),
        "tuned": (78.0, 8.0, 90.3, 3.1, 0.41),
        "constant answer": (1.0, 1.0, 8.0, 1.2, None),
        "copy of the prompt": (0.0, 0.0, 3.4, 0.8, None),
    }
    models = []
    for name, (exact, around, f1, near, loss) in rows.items():
        found = {"exact_match": metric(exact, around, signature=signature), "f1": metric(f1, near)}
        if loss is not None:
            found["loss"] = metric(loss, 0.05)
        models.append({"name": name, "metrics": found})
    return {"models": models}


def records(count: int) -> list[dict]:
    draw = random.Random(0)
    found = []
    for step in range(1, count + 1):
        loss = 0.42 + 2.2 * math.exp(-step / 25) + draw.gauss(0, 0.06)
        record = {
            "step": step,
            "loss": loss,
            "lr": 1e-3 * min(step / 12, 0.5 + 0.5 * math.cos(math.pi * step / count)),
            "grad_norm": 0.4 + 2 * math.exp(-step / 15) + abs(draw.gauss(0, 0.1)),
            "tokens": 4000 + draw.randrange(96),
            "supervised_tokens": 700 + draw.randrange(200),
            "tokens_per_second": 850 + draw.gauss(0, 30),
            "peak_bytes": 1_900_000_000 + 1_000_000 * step,
        }
        if step % 25 == 0:
            record |= {
                "eval_loss": 0.45 + 2 * math.exp(-step / 25),
                "eval_f1": 90 * (1 - math.exp(-step / 30)),
            }
        found.append(record)
    return found


def samples() -> list[dict]:
    call = '<functioncall> {"name": "convert_currency", "arguments": {"amount": 500, "from": "USD", "to": "EUR"}}'
    prompt = (
        "You have these functions: convert_currency(amount, from, to), get_news(topic).\n\n"
        "I need to convert 500 US dollars to euros. Can you help me with that?"
    )
    base = "Sure! To convert 500 US dollars to euros, you would multiply by the current exchange rate. " * 3
    rows = [{"prompt": prompt, "references": [call], "base": base, "tuned": call}]
    rows.append({"prompt": HOSTILE, "references": [ALSO_HOSTILE], "base": HOSTILE * 12, "tuned": ALSO_HOSTILE})
    rows += [
        {"prompt": f"Question {i}?", "references": ["yes", "no"], "base": "", "tuned": "yes", "step": 120}
        for i in range(12)
    ]
    return rows


def plan() -> dict:
    memory = {
        "weights_bytes": 269_000_000,
        "master_bytes": 0,
        "gradients_bytes": 9_700_000,
        "optimizer_bytes": 19_500_000,
        "activations_bytes": 1_240_000_000,
        "total_bytes": 1_538_200_000,
        "peak_bytes": 1_530_000_000,
        "overhead_bytes": 370_000_000,
    }
    work = {"steps": 120, "tokens": 486_000, "flops": 470 * 10**12, "seconds": 502.0}
    return {"parameters": {"total": 136_955_520, "trainable": 2_440_512}, "memory": memory, **work}


def run() -> dict:
    train = {
        "rows": 900,
        "kept": 874,
        "dropped": {"no room for the answer": 20, "nothing to learn": 6},
        "truncated": 31,
        "tokens": 486_310,
        "supervised_tokens": 91_022,
        "duplicates": 3,
        "lengths": {"64": 12, "128": 80, "256": 190, "512": 402, "1024": 190},
    }
    machine = {
        "system": "Linux 6.1",
        "processor": "Some CPU @ 2.0 GHz",
        "cores": 2,
        "memory_bytes": 16_000_000_000,
    }
    return {
        "status": "finished",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "tunesmith": "0.1.0"},
        "machine": machine,
        "seeds": {"train": 0},
        "data": {
            "train": train,
            "eval": {"rows": 100, "kept": 100, "tokens": 54_211, "supervised_tokens": 10_007},
        },
        "measured": {
            "peak_bytes": 1_962_000_000,
            "seconds": 541.3,
            "tokens": 486_310,
            "tokens_per_second": 898.4,
        },
        "model": {
            "name": "smollm2-135m",
            "fingerprint": "5f2a90c1d4e8",
            "parameters": {"total": 136_955_520, "trainable": 2_440_512},
        },
        "method": {"kind": "lora", "rank": 16, "targets": ["q", "k", "v", "o"]},
    }


def write_run(folder: Path) -> Path:
    """A run folder as a finished run leaves it, hostile generations among its samples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(120)))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples()))
    for name, found in (("eval", scores()), ("plan", plan()), ("run", run())):
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would take them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        self.text = "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


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


def test_ticks_are_round_and_inside():
    assert plots.nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert plots.nice_ticks(1, 120, 5) == [25, 50, 75, 100]
    assert plots.nice_ticks(3, 3, 5) == [3]


def test_thinning_keeps_the_ends_and_the_mean():
    points = [(float(x), float(x % 7)) for x in range(1000)]
    few = plots.thin(points, 50)
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert len(few) <= 51
    assert sum(y for _, y in few) / len(few) == pytest.approx(3, abs=0.2)


def test_smoothing_leaves_a_straight_line_alone():
    """Kills: averaging backwards only, which lags behind."""
    line = [(float(x), 3.0 * x) for x in range(20)]
    assert [y for _, y in plots.smooth(line, 4)] == pytest.approx([y for _, y in line])
    assert plots.smooth([(float(x), 2.0) for x in range(9)], 4) == [(float(x), 2.0) for x in range(9)]


def test_bars_share_a_scale_and_start_at_zero_inside_the_picture():
    """Kills: starting bars at the smallest value; a scale that leaves zero outside."""
    bars = [plots.interval_bar(value, None, None, (5, 20)) for value in (5, 10, 20)]
    starts = {float(re.search(r' x="([\d.-]+)"', bar)[1]) for bar in bars}
    wide = [float(re.search(r' width="([\d.]+)"', bar)[1]) for bar in bars]
    assert len(starts) == 1
    assert min(starts) >= 0
    assert wide[1] == pytest.approx(2 * wide[0], rel=0.01)
    assert wide[2] == pytest.approx(4 * wide[0], rel=0.01)
