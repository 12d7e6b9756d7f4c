"""A run from its configuration to its report: prepared, planned, adapted, judged before, trained, judged after.

This is the one place where packages of a layer meet; what each does stands in its own file, and everything a run
leaves behind is in its folder. Resuming goes through the same lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config, as_dict
from tunesmith.core.errors import CheckpointError, ModelError
from tunesmith.core.files import canonical_json, write_atomic
from tunesmith.core.process import speaks
from tunesmith.data.deal import cut_again, dealt
from tunesmith.evaluate.metrics import OF_PROBLEM
from tunesmith.parallel.launch import is_restarted, started
from tunesmith.parallel.layout import Layout, LayoutSection, layout_of
from tunesmith.parallel.world import ALONE, Alone
from tunesmith.run.beginning import how_computed, seconds_of_libraries, started_line
from tunesmith.run.folder import RunFolder, check_state, check_writable, locked, machine, versions
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.run.spreading import settled
from tunesmith.run.stopping import stoppable

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.data.pack import Cursor
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.trunk import Trunk
    from tunesmith.run.feeding import Feed
    from tunesmith.run.judging import Judge
    from tunesmith.train.tuned import Result


def run(config: Config, *, resume: bool = False, before: bool = True, began: float | None = None) -> Path:
    """Does everything a configuration says and answers the run folder.

    Args:
        resume: go on with the run in the folder.
        before: judge the untuned model, too, for the table of the run.
        began: when it was begun, in seconds of `time.time()`; by default when the program was.

    Raises: any TunesmithError; what was saved before stays, and `resume` goes on from there. Signals become Stopped.
    """
    folder = RunFolder(config.out)
    with stoppable(folder), world_of(config.layout) as world:
        config, why = settled(config, folder, world)
        if why and world.is_first:
            say(why)
        return _run(config, folder, resume or (is_restarted() and folder.exists), before, world, began)


def _run(config: Config, folder: RunFolder, resume: bool, before: bool, world: Alone, began: float | None) -> Path:
    def is_finished() -> bool:
        check_writable(folder.path)
        check_state(folder, config, resume)
        return folder.is_finished

    if world.first(is_finished):
        say(f"{folder.path}: this run is finished; nothing to do")
        return folder.path
    prepared = world.in_turn(lambda: prepare(config))
    for line in prepared.lines():
        say(line)
    with ExitStack() as stack:

        def open_folder() -> None:
            stack.enter_context(locked(folder))
            check_state(folder, config, resume)  # again: another process may have been here since
            _check_data(folder, prepared)

        world.first(open_folder)
        libraries = seconds_of_libraries()  # only now: what is wrong with a run is said without them
        with _withdrawn_on_error(folder, config) if world.is_first else nullcontext():
            ready = _make_ready(prepared, folder, world)
        say(started_line(libraries, began))
        _carry_out(ready, folder, resume, before)
    return folder.path


@contextmanager
def world_of(section: LayoutSection) -> Iterator[Alone]:
    """The processes of a run while the block runs. Raises ConfigError where they are not those of the layout."""
    rank, size = started(section, "tunesmith launch CONFIG")
    if size == 1:
        yield ALONE
        return
    from tunesmith.parallel.world import joined

    with joined(rank, size) as world:
        yield world


def say(line: str) -> None:
    """One line for the person who watches."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


def _check_data(folder: RunFolder, prepared: Prepared) -> None:
    before, now = folder.facts.get("data"), prepared.data_facts()
    for part in ("train", "eval", "start", "teacher", "rewards"):
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
    layout: Layout
    compute: str
    recompute: dict[str, Any] | None


def _make_ready(prepared: Prepared, folder: RunFolder, world: Alone) -> _Ready:
    from tunesmith.kernels.build import made_with
    from tunesmith.run.judging_heads import judge_of
    from tunesmith.train.probe import choose_threads

    # what the others have to say is what went wrong
    level = logging.INFO if world.is_first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("transformers", "urllib3", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    gain = choose_threads()
    chosen = world.first(lambda: _planned(prepared, folder, gain))
    loaded = _load(prepared, chosen["precision"])
    _check_same(prepared, loaded, world)
    layout = layout_of(prepared.config.layout, world)
    if world.is_first:
        folder.record(
            status="running", versions=versions(), machine=machine(), kernels=made_with(), data=prepared.data_facts(),
            seed=prepared.config.train.seed, layout=as_dict(prepared.config)["layout"],
            model=_model_facts(loaded, prepared.config.model), **chosen,
        )  # fmt: skip
    return _Ready(prepared, loaded, judge_of(prepared, folder.path), layout, chosen["precision"], chosen["recompute"])


def _check_same(prepared: Prepared, loaded: Loaded, world: Alone) -> None:
    """Raises ModelError where a process has another model, other rows or another configuration than the first."""
    mine = {
        "model": loaded.fingerprint,
        "data": prepared.data_facts()["train"]["sha256"],
        "config": as_dict(prepared.config),
    }
    told = world.told(mine)
    for rank, facts in enumerate(told):
        other = [name for name in mine if facts[name] != told[0][name]]
        if other:
            raise ModelError(f"rank {rank} has not the files of rank 0: its {', '.join(other)}", where=other[0])


def _load(prepared: Prepared, compute: str) -> Loaded:
    from tunesmith.models.load import load

    loaded = load(str(prepared.folder), dtype=compute, base=prepared.config.precision.base)  # type: ignore[arg-type]
    loaded.predicts = prepared.problem
    return loaded


def _planned(prepared: Prepared, folder: RunFolder, gain: float) -> dict[str, Any]:
    """Plans the run, and answers what it chose for all processes."""
    from tunesmith.plan.choice import check_fits
    from tunesmith.plan.show import show_plan
    from tunesmith.run.planning import plan_run
    from tunesmith.train.precision import resolve

    # a resumed run computes as it began, wherever it goes on
    compute = folder.facts.get("precision") or resolve(prepared.config.precision)
    say(how_computed(compute, gain))
    before = folder.facts.get("recompute")
    plan = plan_run(prepared, chosen=before)
    if before is None:
        check_fits(plan)
    write_atomic(folder.path / "plan.json", canonical_json(plan.as_dict(), indent=1) + "\n")
    _print(show_plan(plan.as_dict()))
    return {"precision": compute, "recompute": plan.recompute}


def _carry_out(ready: _Ready, folder: RunFolder, resume: bool, before: bool) -> None:
    from tunesmith.evaluate.report import write_report
    from tunesmith.models.policy import Policy
    from tunesmith.run.feeding import feed_of
    from tunesmith.run.planning import recomputed
    from tunesmith.run.starting import attach, receive, route_of

    prepared, loaded, judge, layout = ready.prepared, ready.loaded, ready.judge, ready.layout
    config, is_first = prepared.config, layout.world.is_first
    received, teaching = receive(prepared, loaded), None
    judge.received = route_of(received)
    if prepared.teacher is not None:
        from tunesmith.run.teaching import Teaching

        teaching = Teaching(prepared, loaded, ready.compute)
        judge.taught_by(teaching)
    if before and is_first:
        judge.before(loaded, judge.received)
    adapter = attach(prepared, loaded, received)
    how = recomputed(config, ready.recompute)
    policy = Policy(loaded, adapter.route, recompute=how, packed=config.data.packing)
    policy.reference = judge.received
    feed = feed_of(prepared, loaded, policy, judge.received, teaching, folder, layout.data)
    judge.earned = feed.earned
    result = _train(ready, folder, adapter, policy, resume, feed)
    weights = layout.whole(layout.pieces) if layout.in_parts else {}
    if not is_first:
        return
    adapter = _made_whole(ready, weights) if weights else adapter
    saved = adapter.save(folder.path)
    judge.after(adapter.loaded, adapter.route, config.method.kind)
    if teaching is not None:
        teaching.close()
    folder.record(measured=_measured(result), result={**asdict(result), "saved": saved.name})
    folder.record(status="finished")
    report = write_report(folder.path)
    judge.print_table()
    say(f"\nsaved {saved}\nreport {report}\nnext: {_next(prepared, folder)}")


def _next(prepared: Prepared, folder: RunFolder) -> str:
    if prepared.problem is None:
        return f"tunesmith chat {folder.path}"
    return f"tunesmith evaluate {folder.path} --data ROWS --metrics {OF_PROBLEM[prepared.problem.kind][1]}"


class _Tuned:
    """The adapter and its policy, as the trainer wants them."""

    def __init__(self, adapter: Adapter, policy: Policy, trunk: Trunk | None, memory: Mapping[str, Any]) -> None:
        from tunesmith.models.stored import Stored

        value = {} if policy.value is None else {f"value.{name}": one for name, one in policy.value.named_parameters()}
        self.parameters = dict(sorted({**adapter.parameters, **value}.items()))
        self.policy = policy
        self.phases = adapter.phases
        self.on_phase = (lambda number: None) if trunk is None else trunk.begin
        self.lr_factors = adapter.lr_factors
        self.stored = Stored(adapter.loaded).finer
        self.memory = {**adapter.memory, **memory}
        self.penalty, self.after_step = adapter.penalty, adapter.after_step


def _train(ready: _Ready, folder: RunFolder, adapter: Adapter, policy: Policy, resume: bool, feed: Feed) -> Result:
    from tunesmith.models.trunk import Trunk
    from tunesmith.train.trainer import train

    prepared, layout = ready.prepared, ready.layout
    config = prepared.config
    with ExitStack() as stack:
        trunk = None
        if config.train.cache_trunk:
            trunk = policy.trunk = Trunk(adapter.loaded, folder.path / "cache", config.train.cache_trunk)
            stack.callback(trunk.close)
        tuned = layout.adopt(_Tuned(adapter, policy, trunk, feed.memory))
        result = train(
            tuned,
            feed.stream or _stream(prepared, layout.data),
            config.objective,
            config.train,
            config.precision,
            folder.path,
            total_steps=prepared.totals.steps,
            evaluate=ready.judge.during(adapter.loaded, tuned.policy) if config.evaluate.every else None,
            evaluate_every=config.evaluate.every,
            observers=_observers(prepared, folder, stack, feed) if layout.world.is_first else (),
            resume=resume,
            layout=layout,
            sample=feed.sample,
            collate=feed.collate,
        )
        if trunk is not None:
            policy.trunk = None
            trunk.remove()
        return result


def _observers(prepared: Prepared, folder: RunFolder, stack: ExitStack, feed: Feed) -> list[Any]:
    from tunesmith.train.log import TensorBoard
    from tunesmith.train.progress import training_progress

    observers: list[Any] = [stack.enter_context(training_progress(prepared.totals.steps))]
    observers += [stack.enter_context(closing(watcher)) for watcher in feed.watchers(folder.path)]
    if "tensorboard" in prepared.config.log:
        observers.append(stack.enter_context(closing(TensorBoard(folder.path / "tensorboard"))))
    return observers


def _stream(prepared: Prepared, data: Alone) -> Callable[[Cursor], Iterable[Any]]:
    """The steps of the data, with this process's rows."""
    count = prepared.config.layout.micro_batches

    def steps(cursor: Cursor) -> Iterable[Any]:
        found: Iterable[Any] = prepared.stream(cursor)
        if data.size > 1:
            found = dealt(found, prepared.sizes, data.rank, data.size)
        return found if count is None else cut_again(found, count)

    return steps


def _made_whole(ready: _Ready, weights: dict[str, Any]) -> Adapter:
    """The base from its files once more, with what was trained: a model in parts cannot be put together in place."""
    import torch

    config = ready.prepared.config
    adapter = config.method.attach(_load(ready.prepared, ready.compute), seed=config.train.seed)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            parameter.copy_(weights[name])
    return adapter


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
        **_idle(result.ranks),
    }


def _idle(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """The share of their time that the processes of a pipeline waited, on average, and the least there can be."""
    told = [rank for rank in ranks if "idle_share" in rank]
    names = ("idle_share", "least_idle_share") if told else ()
    return {name: round(sum(rank[name] for rank in told) / len(told), 4) for name in names}


def _print(what: Any) -> None:
    from rich.console import Console

    if speaks():
        Console(stderr=True, highlight=False).print(what)
