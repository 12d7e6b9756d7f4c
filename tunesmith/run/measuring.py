"""What a finished trial is worth beyond its score: size, speed, what it forgot, the rank of what it learnt.

The one idea: a latency is a ratio to the base, measured in turns within one process, so that a busy machine slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config
from tunesmith.core.errors import AdapterError, CheckpointError
from tunesmith.core.files import read_json, strict_loads
from tunesmith.data.section import DataSection
from tunesmith.run.folder import RunFolder
from tunesmith.run.prepare import prepare, read_data

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.data.codec import Codec
    from tunesmith.data.dataset import Dataset
    from tunesmith.models.load import Loaded
    from tunesmith.models.route import Route

ROUNDS = 7
GENERAL_ROWS, GENERAL_TOKENS = 24, 256
_PROMPT_TOKENS, _NEW_TOKENS, _READ_TOKENS = 16, 12, 64


def measure(folder: RunFolder, config: Config, forgetting: str | None, *, timed: bool = True) -> dict[str, Any]:
    """Facts of a finished run, as `trial.json` keeps them.

    Args:
        forgetting: general text whose loss is measured with what was learnt; None for none.
        timed: measure its latency, too.
    """
    from tunesmith.run.opening import open_model

    facts = folder.facts
    opened = open_model(str(folder.path), precision=facts["precision"])
    found: dict[str, Any] = {
        "seed": config.train.seed,
        "metrics": _metrics(folder.path),
        "bytes": _bytes(folder.path),
        "cpu_seconds": _sum_of_records(folder.path, "cpu_seconds"),
        "loss": _last_record(folder.path).get("loss"),
        **{name: facts["measured"][name] for name in ("peak_bytes", "seconds", "tokens", "tokens_per_second")},
    }
    if forgetting is not None:
        found["general_loss"] = general_loss(opened.loaded, opened.route, opened.codec, forgetting)
    found["spectrum"] = _spectrum(opened.loaded, opened.adapter, config.model)
    if timed:
        found["latency"] = latency(opened.loaded, opened.adapter)
    return found


def measure_base(config: Config, forgetting: str | None) -> dict[str, Any]:
    """Facts of the base: its scores, those of answers that need no model, and its loss on general text."""
    from tunesmith.models.load import load
    from tunesmith.models.route import BASE
    from tunesmith.run.judging_heads import judge_of
    from tunesmith.train.precision import resolve

    prepared = prepare(config)
    RunFolder(config.out).write_config(config)
    loaded = load(str(prepared.folder), dtype=resolve(config.precision), base=config.precision.base)
    judge = judge_of(prepared, Path(config.out))
    judge.before(loaded, BASE)
    found: dict[str, Any] = {
        "models": judge.models,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
    }
    if forgetting is not None:
        found["general_loss"] = general_loss(loaded, BASE, prepared.codec, forgetting)
    return found


def general_rows(source: str, codec: Codec) -> Dataset:
    """Running text of which nothing was trained on. Raises DataError, ConfigError."""
    settings = {"eval": source, "max_length": GENERAL_TOKENS, "template": "plain"}
    section = DataSection.model_validate(settings)
    return read_data(section.eval, section, codec, "--forgetting")[0]


def general_loss(loaded: Loaded, route: Route, codec: Codec, source: str) -> float | None:
    """Nats a token on general text; None for a model that does not write."""
    from tunesmith.data.encode import Example
    from tunesmith.evaluate.losses import row_losses
    from tunesmith.models.policy import Policy

    if loaded.family.kind != "decoder":
        return None
    rows = general_rows(source, codec)
    examples = [rows.example(*place) for place in list(rows.places())[:GENERAL_ROWS]]
    kept = [example for example in examples if isinstance(example, Example)]
    totals, tokens = row_losses(Policy(loaded, route), kept)
    return sum(totals) / max(1, sum(tokens))


def latency(loaded: Loaded, adapter: Adapter | None, rounds: int = ROUNDS) -> dict[str, Any] | None:
    """Seconds of a forward pass over those of the base: {unmerged, merged: {ratio, low, high}}.

    Each round runs every way once, so that a ratio compares neighbours in time; low and high are quartiles. Decoders
    write a few tokens one by one, others read. Merged is None for a method that is no change of weights, and all is
    None for a run that changed the model itself, which is as fast as before.
    """
    from tunesmith.adapt.merge import merge, unmerge
    from tunesmith.models.route import BASE

    if adapter is None or not adapter.inserts():
        return None
    base, unmerged = _pass(loaded, BASE), _pass(loaded, adapter.route)
    mergeable = _mergeable(loaded, adapter)
    ratios: dict[str, list[float]] = {"unmerged": [], "merged": []}
    for turn in range(rounds + 1):
        ways = {"base": base, "unmerged": unmerged}
        if turn % 2:  # nothing is always first
            ways = dict(reversed(ways.items()))
        seconds = {name: _timed(way) for name, way in ways.items()}
        if mergeable:
            merge(loaded, adapter.name)
            seconds["merged"] = _timed(unmerged)
            unmerge(loaded)
        if turn:  # the first warms up
            for name in ("unmerged", "merged"):
                ratios[name] += [seconds[name] / seconds["base"]] if name in seconds else []
    return {name: _spread(found) for name, found in ratios.items()}


def _mergeable(loaded: Loaded, adapter: Adapter) -> bool:
    from tunesmith.adapt.merge import merge, unmerge

    try:
        merge(loaded, adapter.name)
    except AdapterError:
        return False
    unmerge(loaded)
    return True


def _pass(loaded: Loaded, route: Route) -> Callable[[], Any]:
    import torch

    from tunesmith.data.batch import to_batch
    from tunesmith.data.encode import Example
    from tunesmith.models.generate import generate
    from tunesmith.models.policy import Policy

    ids = [10 + index % 50 for index in range(_READ_TOKENS)]
    if loaded.family.kind == "decoder":
        prompt = ids[:_PROMPT_TOKENS]
        return lambda: generate(loaded, route, [prompt], max_new_tokens=_NEW_TOKENS, stop_ids=set())
    policy = Policy(loaded, route)
    batch = to_batch([Example(ids, [False] + [True] * (len(ids) - 1), f"row:{row}", 0) for row in range(4)])

    def read() -> None:
        with torch.no_grad():
            policy.hidden(batch)

    return read


def _timed(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _spread(ratios: list[float]) -> dict[str, float] | None:
    if not ratios:
        return None
    low, _, high = quantiles(ratios, n=4)
    return {"ratio": round(median(ratios), 4), "low": round(low, 4), "high": round(high, 4)}


def _spectrum(loaded: Loaded, adapter: Adapter | None, base: str) -> dict[str, Any] | None:
    from tunesmith.evaluate.spectrum import changes_of_adapter, changes_of_model, spectrum
    from tunesmith.models.load import DTYPES, load

    if adapter is not None:
        found = spectrum(changes_of_adapter(adapter))
    else:
        names = {dtype: name for name, dtype in DTYPES.items()}
        before: Any = load(base, dtype=names[loaded.model.dtype])  # type: ignore[arg-type,index]
        found = spectrum(changes_of_model(loaded.model, before.model))
    return found.as_dict() if found else None


def _metrics(folder: Path) -> dict[str, Any]:
    models = read_json(folder / "eval.json", CheckpointError)["models"]
    return next(model["metrics"] for model in models if model["name"].startswith("tuned"))


def _bytes(folder: Path) -> int:
    """Size of what the run has saved to be used: `adapter/`, or `model/`."""
    made = next(folder / name for name in ("adapter", "model") if (folder / name).is_dir())
    return sum(file.stat().st_size for file in made.rglob("*") if file.is_file())


def _records(folder: Path) -> list[dict[str, Any]]:
    return [strict_loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def _last_record(folder: Path) -> dict[str, Any]:
    return _records(folder)[-1]


def _sum_of_records(folder: Path, name: str) -> float | None:
    found = [record[name] for record in _records(folder) if name in record]
    return round(sum(found), 3) if found else None
