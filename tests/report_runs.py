"""A run folder with everything a report can show, some of it hostile, and a reader of the page."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

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
