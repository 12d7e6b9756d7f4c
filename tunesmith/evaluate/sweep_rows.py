"""From the facts of trials to the rows of a sweep: means over seeds, and what a point of score costs.

Works on plain values, as the files of a sweep hold them. How rows are shown is `sweep_table.py` and `sweep_page.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tunesmith.evaluate.metrics import METRICS, PREDICTED
from tunesmith.evaluate.seeds import over_seeds

Facts = dict[str, Any]


def sweep_row(setting: Facts, trials: Sequence[Facts], base: Facts, metric: str) -> Facts:
    """One row: what was set, and the means of what its finished trials came to.

    Args:
        setting: name, kind, why, method, parameters, head_parameters, lr, note.
        trials: facts of trials of all seeds, ended or not.
        base: the base's own row, from `base_row`.
        metric: the score.
    """
    done = [trial for trial in trials if trial.get("status") == "finished"]
    failed = [trial for trial in trials if trial.get("status") == "failed"]
    score = over_seeds([trial["metrics"][metric]["value"] for trial in done])
    general = over_seeds([found for found in (trial.get("general_loss") for trial in done) if found is not None])
    row = {
        **setting,
        "share": setting["parameters"] / max(1, base["parameters"]),
        "score": score.as_dict() if score else None,
        "metrics": {name: _values(done, name) for name in (done[0]["metrics"] if done else ())},
        **{name: _mean(done, name) for name in ("tokens_per_second", "peak_bytes", "bytes", "cpu_seconds", "seconds")},
        "latency": next((trial["latency"] for trial in done if trial.get("latency")), None),
        "spectrum": next((trial["spectrum"] for trial in done if trial.get("spectrum")), None),
        "general_loss": general.as_dict() if general else None,
        "trials": len(trials),
        "finished": len(done),
        "failures": [{"seed": trial.get("seed"), "error": trial.get("error")} for trial in failed],
    }
    return row | _gains(row, base, metric)


def base_row(facts: Facts, metric: str, answers: Sequence[str] = ("untuned",)) -> Facts:
    """The base by itself, as rows compare themselves with it.

    Args:
        answers: whose score is the base's, the first that has one: the untuned model, or, where a model has nothing
            to answer with before it is tuned, a constant answer.
    """
    models = {model["name"]: model["metrics"] for model in facts.get("models", ())}
    name = next((name for name in answers if metric in models.get(name, ())), None)
    return {
        "name": name,
        "score": models[name][metric]["value"] if name else None,
        "models": models,
        "parameters": facts["parameters"],
        "general_loss": facts.get("general_loss"),
    }


def sort_rows(rows: Sequence[Facts], metric: str) -> list[Facts]:
    """Rows of the budget first, the best of each group first, those without a score last."""
    sign = -1 if higher_is_better(metric) else 1
    order = {"budget": 0, "reference": 1, "ranks": 2}

    def key(row: Facts) -> tuple[Any, ...]:
        score = row["score"]
        return order.get(row["why"], 3), score is None, sign * score["mean"] if score else 0.0, row["name"]

    return sorted(rows, key=key)


def rank_table(rows: Sequence[Facts], metric: str) -> list[Facts]:
    """LoRA by weight types (rows) and rank (columns), where a weight type was run at several ranks."""
    found: dict[str, dict[int, Facts]] = {}
    for row in rows:
        method = row["method"]
        plain = not any(method.get(name) for name in ("dora", "rslora", "also_train", "ranks"))
        if row["kind"] == "lora" and row["score"] and plain and method.get("init", "default") == "default":
            found.setdefault(" ".join(method["targets"]), {})[method["rank"]] = row["score"]
    return [{"targets": name, "ranks": dict(sorted(by.items()))} for name, by in found.items() if len(by) > 1]


def higher_is_better(metric: str) -> bool:
    registry = METRICS if metric in METRICS.table else PREDICTED
    return bool(registry.load(metric).higher_is_better)


def _gains(row: Facts, base: Facts, metric: str) -> Facts:
    """What was gained over the base, what a point of it cost, and what was forgotten."""
    gain = cost = forgotten = None
    if row["score"] and base["score"] is not None:
        gain = (row["score"]["mean"] - base["score"]) * (1 if higher_is_better(metric) else -1)
        if gain > 0 and row["cpu_seconds"] is not None:
            cost = row["cpu_seconds"] / gain
    if row["general_loss"] and base["general_loss"] is not None:
        forgotten = row["general_loss"]["mean"] - base["general_loss"]
    return {"gain": gain, "cpu_seconds_per_point": cost, "forgetting": forgotten}


def _values(trials: Sequence[Facts], metric: str) -> Facts:
    found = over_seeds([trial["metrics"][metric]["value"] for trial in trials if metric in trial["metrics"]])
    return found.as_dict() if found else {}


def _mean(trials: Sequence[Facts], name: str) -> float | None:
    found = [trial[name] for trial in trials if trial.get(name) is not None]
    return fmean(found) if found else None
