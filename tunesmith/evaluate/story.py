"""What a report says, put together from the files of a run: headline, curves, scores, samples, costs, data.

Every part is a function of the files that gives a value the template can show, empty when its file is missing.
Reading files and rendering are in `report`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith.core.amounts import in_bytes, in_count, in_time
from tunesmith.core.visible import visible
from tunesmith.evaluate import plots
from tunesmith.evaluate.own_writing import FOLLOWED, written
from tunesmith.evaluate.pair_charts import pair_charts
from tunesmith.evaluate.verdict import headline, listed, mapping, metric_name, number, score, score_tables

_STATUS = {"finished": "good", "done": "good", "diverged": "bad", "failed": "bad"}
_LONG = 700  # characters of a sample shown before it is folded
_LONGEST = 20_000


@dataclass(frozen=True)
class Files:
    """What a run folder holds, as plain data; empty where a file is missing.

    Attributes:
        config_text, config: config.yaml as written and as read.
        records, broken_records: of metrics.jsonl, and how many of its lines could not be read.
        samples: rows of samples.jsonl.
        rollouts: of rollouts.jsonl, completions that were learnt from.
        scores, plan, run: eval.json, plan.json, run.json.
    """

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    broken_records: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def tell(files: Files) -> dict[str, Any]:
    """Everything the template shows."""
    asked = [str(name) for name in listed(mapping(files.config.get("evaluate")).get("metrics"))]
    tables = score_tables(files.scores, asked)
    config = {"model": mapping(files.run.get("model")).get("name"), **files.config}
    status = str(files.run.get("status", ""))
    return {
        "title": files.folder.resolve().name,
        "status": status,
        "status_kind": _STATUS.get(status, "open"),
        "headline": headline(config, tables, series(files, "loss")),
        "tiles": tiles(files),
        "charts": charts(files),
        "values": values(files),
        "broken_records": files.broken_records,
        "tables": tables,
        "samples": [sample(row) for row in files.samples],
        "written": written(files.rollouts, files.run.get("constant"), files.records),
        "planned": planned(files),
        "parts": memory_parts(files),
        "data": [data_part(name, found) for name, found in mapping(files.run.get("data")).items()],
        "config_text": files.config_text,
        "facts": facts(files),
        "commands": commands(files),
    }


def charts(files: Files) -> list[dict[str, Any]]:
    """Loss, learning rate, and whatever else was followed during training."""
    losses = series(files, "loss")
    reach = len(losses) // 50
    lines = [plots.Series("loss", plots.smooth(losses, reach))]
    if reach:
        lines.insert(0, plots.Series("each step", losses, "faint"))
    lines.append(plots.Series("held out", series(files, "eval_loss"), "second"))
    found = [("Loss", plots.line_chart("Loss", lines, lambda value: f"{value:.2f}"))]
    found.append(("Learning rate", _chart(files, "lr", "learning rate", small)))
    followed = dict.fromkeys(key for record in files.records for key in record if key.startswith("eval_"))
    for key in followed:
        name = metric_name(key[5:])
        if key != "eval_loss" and not key.endswith(("_seconds", "_per_second", "_bytes")):
            found.append((f"Held-out {name}", _chart(files, key, name, score)))
    for key, (title, name) in FOLLOWED.items():
        found.append((title, _chart(files, key, name, score)))
    found.append(("Gradient norm", _chart(files, "grad_norm", "gradient norm", score)))
    found.append(("Tokens per second", _chart(files, "tokens_per_second", "tokens per second", in_count)))
    told = [{"name": name, "picture": picture} for name, picture in found if picture]
    return [*told, *pair_charts(files.scores)]


def _chart(files: Files, key: str, name: str, show: Callable[[float], str]) -> Markup:
    return plots.line_chart(name, [plots.Series(name, series(files, key))], show)


def series(files: Files, key: str) -> list[plots.Point]:
    """(step, value) of every record that has a finite value."""
    found = []
    for place, record in enumerate(files.records, 1):
        value = number(record.get(key))
        if value is not None:
            found.append((number(record.get("step")) or float(place), value))
    return found


def values(files: Files) -> list[dict[str, str]]:
    """Some twenty records as text: what the curves show, for those who cannot see them."""
    size = max(1, math.ceil(len(files.records) / 20))
    chosen = files.records[::size]
    if files.records and chosen[-1] is not files.records[-1]:
        chosen = [*chosen, files.records[-1]]
    keys = {"step": "step", "loss": "loss", "lr": "learning rate", "eval_loss": "held-out loss"}
    keys = {key: name for key, name in keys.items() if any(number(row.get(key)) is not None for row in files.records)}
    return [{name: _cell(key, number(record.get(key))) for key, name in keys.items()} for record in chosen]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if key == "step" else small(value) if key == "lr" else f"{value:.3f}"


def tiles(files: Files) -> list[tuple[str, str]]:
    """The few figures a reader looks for first."""
    measured = mapping(files.run.get("measured"))
    trained = number(mapping(files.plan.get("parameters")).get("trainable"))
    total = number(mapping(files.plan.get("parameters")).get("total"))
    share = f" ({100 * trained / total:.2g} %)" if trained and total else ""
    found = [
        ("trained parameters", trained, lambda value: in_count(value) + share),
        (
            "steps",
            number(files.records[-1].get("step")) if files.records else None,
            lambda value: f"{value:,.0f}",
        ),
        ("tokens read", number(measured.get("tokens")), in_count),
        ("training time", number(measured.get("seconds")), in_time),
        ("tokens per second", number(measured.get("tokens_per_second")), in_count),
        ("peak memory", number(measured.get("peak_bytes")), in_bytes),
    ]
    return [(name, show(value)) for name, value, show in found if value is not None]


def planned(files: Files) -> list[dict[str, str]]:
    """Predicted beside measured, with their ratio; either may be missing."""
    memory, measured = mapping(files.plan.get("memory")), mapping(files.run.get("measured"))
    parameters = mapping(files.plan.get("parameters"))
    counted = mapping(files.run.get("model")).get("parameters")
    counted = counted if isinstance(counted, dict) else {"total": counted}
    peak = number(memory.get("peak_bytes") or memory.get("total_bytes"))
    resident = number(memory.get("resident_bytes"))
    if resident is None and peak is not None:  # of an older plan
        resident = peak + (number(memory.get("overhead_bytes")) or 0)
    rows = [
        ("parameters", parameters.get("total"), counted.get("total"), "{:,.0f}".format),
        ("trained parameters", parameters.get("trainable"), counted.get("trainable"), "{:,.0f}".format),
        ("peak memory", resident, measured.get("peak_bytes"), in_bytes),
        ("tokens", files.plan.get("tokens"), measured.get("tokens"), "{:,.0f}".format),
        ("training time", files.plan.get("seconds"), measured.get("seconds"), in_time),
    ]
    return [_compared(name, number(one), number(other), show) for name, one, other, show in rows if one is not None]


def _compared(name: str, predicted: float | None, measured: float | None, show: Any) -> dict[str, str]:
    ratio = f"{measured / predicted:.2f}" if predicted and measured is not None else ""
    return {
        "name": name,
        "predicted": "" if predicted is None else show(predicted),
        "measured": "" if measured is None else show(measured),
        "ratio": ratio,
    }


def memory_parts(files: Files) -> dict[str, Any]:
    """The predicted memory as one bar and its legend."""
    memory = mapping(files.plan.get("memory"))
    names = ("weights", "master", "gradients", "optimizer", "activations", "overhead")
    sizes = [(name, number(memory.get(f"{name}_bytes")) or 0.0) for name in names]
    titles = {"master": "master weights", "optimizer": "optimizer state", "overhead": "Python and libraries"}
    legend = [
        {"index": index, "name": titles.get(name, name), "size": in_bytes(size)}
        for index, (name, size) in enumerate(sizes)
        if size
    ]
    return {"bar": plots.stacked_bar(sizes), "legend": legend}


def data_part(name: str, found: Any) -> dict[str, Any]:
    """One dataset: its counts as text, and the lengths of its rows as a picture."""
    found = mapping(found)
    dropped = found.get("dropped")
    reasons = dropped if isinstance(dropped, dict) else {}
    tokens, learnt = number(found.get("tokens")), number(found.get("supervised_tokens"))
    lost = float(sum(number(count) or 0 for count in reasons.values())) if reasons else number(dropped)
    rows = [
        ("rows", number(found.get("rows"))),
        ("kept", number(found.get("kept"))),
        ("dropped", lost),
        *((f"dropped: {reason}", number(count)) for reason, count in reasons.items()),
        ("truncated", number(found.get("truncated"))),
        ("tokens", tokens),
        ("supervised tokens", learnt),
    ]
    known = {"rows", "kept", "dropped", "truncated", "tokens", "supervised_tokens"}
    rows += [(key.replace("_", " "), number(value)) for key, value in found.items() if key not in known]
    counts = [(title, f"{value:,.0f}") for title, value in rows if value is not None]
    if tokens and learnt is not None:
        counts.append(("supervised share", f"{100 * learnt / tokens:.0f} %"))
    return {"name": name, "counts": counts, "lengths": _lengths(found), "notes": _notes(found)}


def _notes(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), value) for key, value in found.items() if isinstance(value, str)]


def _lengths(found: dict[str, Any]) -> Markup:
    lengths = next((value for key, value in found.items() if "histogram" in key or key == "lengths"), None)
    if isinstance(lengths, dict):
        # JSON sorts keys as text: 1024 before 128
        keys = sorted(lengths, key=lambda key: (int(key), key) if key.isdecimal() else (0, key))
        bins = [(f"\u2264 {key}" if key.isdecimal() else key, number(lengths[key]) or 0.0) for key in keys]
    elif isinstance(lengths, list):
        rows = [row for row in lengths if isinstance(row, list | tuple) and len(row) >= 2]
        bins = [(str(row[0]), number(row[-1]) or 0.0) for row in rows]
    else:
        bins = []
    return plots.histogram(bins[:64], "rows by tokens")


def sample(row: dict[str, Any]) -> dict[str, Any]:
    """One prompt with what was wanted and what each model wrote."""
    references = row.get("references")
    wanted = [str(text) for text in references] if isinstance(references, list) else []
    columns = [("reference", "\n\n".join(wanted) if wanted else None)]
    columns += [("before", row.get("base")), ("after", row.get("tuned"))]
    same = {text.strip() for text in wanted}
    shown = [
        {"name": name, "text": folded(text), "right": name != "reference" and str(text).strip() in same}
        for name, text in columns
        if text is not None
    ]
    return {"prompt": folded(row.get("prompt", "")), "columns": shown, "step": row.get("step")}


def folded(text: Any) -> dict[str, Any]:
    """A text with its beginning where it is long, and a note where it is too long to be shown whole."""
    whole = visible(text)
    rest = len(whole) - _LONGEST
    whole = whole if rest <= 0 else f"{whole[:_LONGEST]}\n[... {rest:,} more characters in samples.jsonl]"
    is_long = len(whole) > _LONG or whole.count("\n") > 16
    start = "\n".join(whole[: _LONG // 2].split("\n")[:8]) if is_long else ""
    return {"whole": whole, "start": start}


def facts(files: Files) -> list[tuple[str, list[tuple[str, str]]]]:
    """Versions, machine, seeds and the rest of run.json, as groups of names and values."""
    shown = ("versions", "machine", "model", "method", "seeds")
    groups = []
    for group in shown:
        found = files.run.get(group)
        pairs = found.items() if isinstance(found, dict) else [(group, found)] if found is not None else []
        rows = [(str(key).replace("_", " "), _fact(str(key), value)) for key, value in pairs]
        if rows:
            groups.append((group, rows))
    return groups


def _fact(key: str, value: Any) -> str:
    amount = number(value)
    if amount is not None:
        return in_bytes(amount) if key.endswith("_bytes") else f"{amount:,.10g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_fact(str(name), found)}" for name, found in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def commands(files: Files) -> list[tuple[str, str]]:
    """What to do next, as commands that can be copied."""
    run = shlex.quote(str(files.folder))
    if mapping(files.config.get("objective")).get("kind") in ("predict", "reward"):  # they write nothing
        written = [("Judge it on other rows", f"tunesmith evaluate {run} --data ROWS --metrics accuracy")]
    else:
        written = [
            ("Talk to the result", f"tunesmith chat {run}"),
            ("Let it answer one prompt", f"tunesmith generate {run} --prompt 'Your prompt'"),
            ("Make a file for llama.cpp", f"tunesmith export {run} --to gguf {run}/gguf"),
        ]
    merged = ("Make a model that other tools load", f"tunesmith export {run} --to merged {run}/merged")
    found = [*written, merged]
    resume = ("Go on where the run stopped", f"tunesmith tune {run}/config.yaml --resume")
    return found if files.run.get("status") in ("finished", "done") else [resume, *found]


def small(value: float) -> str:
    """A learning rate: 2e-4, 1.5e-5, 0."""
    if not value:
        return "0"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"
