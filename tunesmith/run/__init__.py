"""A run from its configuration to its report: prepared, planned, adapted, judged before, trained, judged after.

This is the one place where packages of a layer meet; what each does stands in its own file, and everything a run
leaves behind is in its folder. Resuming goes through the same lines.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config
from tunesmith.core.errors import CheckpointError
from tunesmith.core.files import canonical_json, write_atomic
from tunesmith.evaluate.metrics import OF_PROBLEM
from tunesmith.run.folder import RunFolder, check_state, check_writable, locked, machine, versions
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.run.stopping import stoppable

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.trunk import Trunk
    from tunesmith.run.judging import Judge
    from tunesmith.train.tuned import Result


def run(config: Config, *, resume: bool = False, before: bool = True) -> Path:
    """Does everything a configuration says and answers the run folder.

    Args:
        resume: go on with the run in the folder.
        before: judge the untuned model, too, for the table of the run.

    Raises: any TunesmithError; what was saved before stays, and `resume` goes on from there. Signals become Stopped.
    """
    folder = RunFolder(config.out)
    with stoppable(folder):
        return _run(config, folder, resume, before)


def _run(config: Config, folder: RunFolder, resume: bool, before: bool) -> Path:
    check_writable(folder.path)
    check_state(folder, config, resume)
    if folder.is_finished:
        say(f"{folder.path}: this run is finished; nothing to do")
        return folder.path
    prepared = prepare(config)
    for line in prepared.lines():
        say(line)
    with locked(folder):
        check_state(folder, config, resume)  # again: another process may have been here since
        _check_data(folder, prepared)
        libraries = _seconds_of_libraries()  # only now: what is wrong with a run is said without them
        with _withdrawn_on_error(folder, config):
            ready = _make_ready(prepared, folder)
        _carry_out(ready, folder, resume, before, libraries)
    return folder.path


def _seconds_of_libraries() -> float:
    """Imports what every run needs and takes longest, and answers how long it took."""
    began = time.monotonic()
    import torch
    import transformers
    from transformers import modeling_utils, tokenization_utils_tokenizers

    del torch, transformers, modeling_utils, tokenization_utils_tokenizers
    return time.monotonic() - began


def say(line: str) -> None:
    """One line for the person who watches."""
    print(line, file=sys.stderr, flush=True)


def _check_data(folder: RunFolder, prepared: Prepared) -> None:
    before, now = folder.facts.get("data"), prepared.data_facts()
    for part in ("train", "eval"):
        old, new = (before or {}).get(part, {}).get("sha256"), now.get(part, {}).get("sha256")
        if before is not None and old != new:
            raise CheckpointError(
                f"the data is not what the run was begun with: {old} then, {new} now",
                where=f"{folder.path}: data.{part}",
                hint="put the old file back, or begin a new run with another out:",
            )


@contextmanager
def _withdrawn_on_error(folder: RunFolder, config: Config) -> Iterator[None]:
    """Begins a run that is not there yet; a mistake found while it is made ready leaves none, so that it can be mended.

    The configuration is written first: from then on a process that dies can be resumed.
    """
    is_new = not folder.exists
    if is_new:
        folder.write_config(config)
    try:
        yield
    except Exception:
        if is_new:
            folder.withdraw()
        raise


@dataclass(frozen=True)
class _Ready:
    """A run of which nothing is missing any more."""

    prepared: Prepared
    loaded: Loaded
    judge: Judge


def _make_ready(prepared: Prepared, folder: RunFolder) -> _Ready:
    from tunesmith.models.load import load
    from tunesmith.plan.choice import check_fits
    from tunesmith.plan.show import show_plan
    from tunesmith.run.judging_heads import judge_of
    from tunesmith.run.planning import plan_run
    from tunesmith.train.precision import resolve
    from tunesmith.train.probe import choose_threads

    config = prepared.config
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("transformers", "urllib3", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # a resumed run computes as it began, wherever it goes on
    compute = folder.facts.get("precision") or resolve(config.precision)
    say(_how(compute, choose_threads()))
    before = folder.facts.get("recompute")
    plan = plan_run(prepared, chosen=before)
    if before is None:
        check_fits(plan)
    write_atomic(folder.path / "plan.json", canonical_json(plan.as_dict(), indent=1) + "\n")
    _print(show_plan(plan.as_dict()))
    loaded = load(str(prepared.folder), dtype=compute, base=config.precision.base)
    loaded.predicts = prepared.problem
    folder.record(
        status="running", versions=versions(), machine=machine(), data=prepared.data_facts(),
        precision=compute, recompute=plan.recompute, seed=config.train.seed, model=_model_facts(loaded, config.model),
    )  # fmt: skip
    return _Ready(prepared, loaded, judge_of(prepared, folder.path))


def _how(compute: str, gain: float) -> str:
    """In what numbers and on how many threads, and what these are worth now."""
    import torch

    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    line = f"computing in {compute} on {threads} thread{'s' if threads > 1 else ''}"
    if gain > 1:
        return f"{line}, {gain:.1f} times as fast as one now"
    if threads > 1 and load > threads / 2:
        line += f"; this machine is busy (load {load:.1f}): OMP_NUM_THREADS=1 may be faster"
    return line


def _carry_out(ready: _Ready, folder: RunFolder, resume: bool, before: bool, libraries: float) -> None:
    from tunesmith.evaluate.report import write_report
    from tunesmith.models.policy import Policy
    from tunesmith.run.planning import recomputed

    prepared, loaded, judge = ready.prepared, ready.loaded, ready.judge
    config = prepared.config
    say(_started(libraries))
    if before:
        judge.before(loaded)
    adapter = config.method.attach(loaded, seed=config.train.seed)
    how = recomputed(config, folder.facts.get("recompute"))
    policy = Policy(loaded, adapter.route, recompute=how, packed=config.data.packing)
    result = _train(prepared, folder, adapter, policy, judge, resume)
    saved = adapter.save(folder.path)
    judge.after(loaded, adapter.route, config.method.kind)
    folder.record(measured=_measured(result), result={**asdict(result), "saved": saved.name})
    folder.record(status="finished")
    report = write_report(folder.path)
    judge.print_table()
    say(f"\nsaved {saved}\nreport {report}\nnext: {_next(prepared, folder)}")


def _started(libraries: float) -> str:
    """How long the program took until all is there to work with, its libraries apart."""
    import psutil

    took = time.time() - psutil.Process().create_time()
    return f"ready after {took - libraries:.1f} s, and {libraries:.1f} s more to import torch and transformers"


def _next(prepared: Prepared, folder: RunFolder) -> str:
    if prepared.problem is None:
        return f"tunesmith chat {folder.path}"
    return f"tunesmith evaluate {folder.path} --data ROWS --metrics {OF_PROBLEM[prepared.problem.kind][1]}"


class _Tuned:
    """The adapter and its policy, as the trainer wants them."""

    def __init__(self, adapter: Adapter, policy: Policy, trunk: Trunk | None = None) -> None:
        from tunesmith.models.stored import Stored

        self.parameters = adapter.parameters
        self.policy = policy
        self.phases = adapter.phases
        self.on_phase = (lambda number: None) if trunk is None else trunk.begin
        self.lr_factors = adapter.lr_factors
        self.stored = Stored(adapter.loaded).finer
        self.memory, self.penalty, self.after_step = adapter.memory, adapter.penalty, adapter.after_step


def _train(
    prepared: Prepared, folder: RunFolder, adapter: Adapter, policy: Policy, judge: Judge, resume: bool
) -> Result:
    from tunesmith.models.trunk import Trunk
    from tunesmith.train.log import TensorBoard
    from tunesmith.train.progress import training_progress
    from tunesmith.train.trainer import train

    config = prepared.config
    with ExitStack() as stack:
        observers: list[Any] = [stack.enter_context(training_progress(prepared.totals.steps))]
        if "tensorboard" in config.log:
            observers.append(stack.enter_context(closing(TensorBoard(folder.path / "tensorboard"))))
        trunk = None
        if config.train.cache_trunk:
            trunk = policy.trunk = Trunk(adapter.loaded, folder.path / "cache", config.train.cache_trunk)
            stack.callback(trunk.close)
        result = train(
            _Tuned(adapter, policy, trunk),
            prepared.stream,
            config.objective,
            config.train,
            config.precision,
            folder.path,
            total_steps=prepared.totals.steps,
            evaluate=judge.during(adapter.loaded, policy) if config.evaluate.every else None,
            evaluate_every=config.evaluate.every,
            observers=observers,
            resume=resume,
        )
        if trunk is not None:
            policy.trunk = None
            trunk.remove()
        return result


def _model_facts(loaded: Loaded, name: str) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {"name": name, "family": loaded.family.name, "fingerprint": loaded.fingerprint, "parameters": count}


def _measured(result: Result) -> dict[str, Any]:
    return {
        "peak_bytes": result.peak_bytes,
        "seconds": result.seconds,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
    }


def _print(what: Any) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(what)
