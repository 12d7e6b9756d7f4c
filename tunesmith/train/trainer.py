"""The one training loop: for every method, objective, precision and layout.

It owns time: steps, evaluations, checkpoints, budgets, signals. What one update is stands in `step.py`. Nothing it
does between two updates can change the next one: all randomness is seeded by (seed, stream, step, micro-batch).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import ConfigError, DataError, DivergedError
from tunesmith.core.rng import seed_for
from tunesmith.data.batch import to_batch
from tunesmith.data.pack import Cursor
from tunesmith.parallel.layout import Layout, Single
from tunesmith.train.checkpoint import State
from tunesmith.train.examine import Examiner
from tunesmith.train.held import held_bytes, storage_bytes
from tunesmith.train.keeper import Keeper, warn_of_changes
from tunesmith.train.log import MetricsLog, peak_bytes
from tunesmith.train.offload import Offload
from tunesmith.train.optim import optimizer_for
from tunesmith.train.phases import span_of, train_only
from tunesmith.train.precision import Precision
from tunesmith.train.scaling import LossScale
from tunesmith.train.schedule import learning_rate
from tunesmith.train.step import accumulate, fill_missing, marked, update
from tunesmith.train.stop import Signals, judge
from tunesmith.train.tuned import Result, Tuned

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.data.pack import Step
    from tunesmith.objectives.objective import Objective
    from tunesmith.train.section import PrecisionSection, TrainSection

log = logging.getLogger(__name__)

Record = dict[str, Any]


def train(
    tuned: Tuned,
    stream_from: Callable[[Cursor], Iterable[Step]],
    objective: Objective,
    settings: TrainSection,
    precision: PrecisionSection,
    folder: Path,
    *,
    total_steps: int,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    observers: Sequence[Callable[[Record], None]] = (),
    resume: bool = False,
    layout: Layout | None = None,
    collate: Callable[[list[Any]], Batch] | None = None,
    sample: Callable[[Any, int], tuple[Step, Record]] | None = None,
) -> Result:
    """Trains until a reason to end, leaving checkpoints and metrics.jsonl in `folder`, and answers how it ended.

    Args:
        stream_from: the steps of the data from a cursor on.
        total_steps: what the schedule is drawn over; the run ends there at the latest.
        evaluate: metrics of the current weights after a step; called every `evaluate_every` steps and at the end.
        observers: see every record after it is written.
        resume: continue from the newest complete checkpoint; bit for bit the run that was not broken.
        layout: the other processes; default none.
        collate: examples of a micro-batch as a Batch; default `data.batch.to_batch`.
        sample: (step, its number) -> the step with what the policy, as it is, writes for its rows, and facts of that.

    Raises: Stopped after a signal, once saved; DivergedError; DataError; CheckpointError; ResourceError. What was
    saved before stays.
    """
    if settings.stop and not (evaluate and evaluate_every):
        raise ConfigError("needs evaluations during training", where="train.stop", hint="set evaluate.every")
    run = _Run(tuned, objective, settings, precision, folder, total_steps, layout or Single())
    run.examiner = Examiner(evaluate, evaluate_every, run.layout, run.cuda_devices)
    run.observers, run.collate, run.sample = list(observers), collate or to_batch, sample
    with ExitStack() as stack:
        for closed in (run.precision, run.layout, run.offload, run.keeper):
            stack.enter_context(closing(closed))
        # the caller's random state is his own
        stack.enter_context(torch.random.fork_rng(devices=run.cuda_devices))
        run.begin(resume)
        if run.is_first:
            run.metrics = stack.enter_context(closing(MetricsLog(folder / "metrics.jsonl", run.logged_step)))
        with Signals() as run.signals:
            run.loop(stream_from)
        run.take_best()
        return run.result()


class _Run:
    """The state of one call of `train`, and its moves."""

    examiner: Examiner
    observers: list[Callable[[Record], None]]
    collate: Callable[[list[Any]], Batch]
    sample: Callable[[Any, int], tuple[Step, Record]] | None
    metrics: MetricsLog
    signals: Signals

    def __init__(
        self,
        tuned: Tuned,
        objective: Objective,
        settings: TrainSection,
        precision: PrecisionSection,
        folder: Path,
        total_steps: int,
        layout: Layout,
    ) -> None:
        self.policy, self.objective, self.settings, self.layout = tuned.policy, objective, settings, layout
        self.world, self.is_first = layout.world, layout.world.is_first
        self.total_steps = total_steps
        self.device = next(iter(tuned.parameters.values())).device
        self.offload = Offload(settings.offload, tuned.policy, self.device, folder)
        stored = getattr(tuned, "stored", lambda name, held: None)
        self.precision = Precision(tuned.parameters, precision, stored, self.offload.room)
        self.pieces = layout.hold(self.precision)
        self.matrices = {name for name, value in tuned.parameters.items() if value.ndim >= 2}
        self.phases = tuple(getattr(tuned, "phases", ()))
        self.lr_factors = dict(getattr(tuned, "lr_factors", {}))
        self.penalty = getattr(tuned, "penalty", lambda: None)
        self.after_step = getattr(tuned, "after_step", lambda step, total_steps: None)
        self.on_phase = getattr(tuned, "on_phase", lambda number: None)
        self._enter(1)
        self.keeper = Keeper(folder, settings.keep, layout, getattr(tuned, "memory", {}))
        self.state = State()
        self.cuda_devices = [self.device] if self.device.type == "cuda" else []
        self.resumed_step = self.weights_step = 0
        self.earlier_seconds, self.start = 0.0, time.monotonic()
        self.held_bytes: dict[str, int] = {}

    # beginning

    def _enter(self, step: int) -> bool:
        """Makes what trains in a step's phase what the optimizer has, without moments; whether anything changed."""
        span = span_of(self.phases, self.precision.masters, step, self.total_steps)
        if span == getattr(self, "span", None):
            return False
        self.span = span
        train_only(self.precision.parameters, span.names)
        self.on_phase(span.number)
        pieces = {name: self.pieces[name] for name in span.names}
        given = (self.settings, self.lr_factors, self.matrices, self.offload.room, self.layout)
        self.optimizer = optimizer_for(pieces, *given)
        return True

    def begin(self, resume: bool) -> None:
        """Starts at step 0, or where the newest complete checkpoint ends."""
        self.world.sent()  # what came before is not the first step's
        if not resume:
            self.keeper.check_fresh()
            return
        known = self.keeper.newest()
        if known is None:
            return log.warning("no checkpoint yet: starting at step 0")
        self._adopt(known)
        self.keeper.prune(self.state.best_step)
        log.info("resuming after step %d", self.state.step)

    def _adopt(self, known: dict[str, Any]) -> None:
        self.state = State(**known["state"])
        self.keeper.read_weights(self.pieces)
        self._enter(max(1, self.state.step))
        self.keeper.read_moments(self.optimizer, self.state.updates)
        if self.precision.scaling is not None:
            self.precision.scaling = LossScale(**self.state.scaling)
        self.layout.publish(self.precision, self.pieces)
        self.resumed_step = self.keeper.saved_step = self.weights_step = self.state.step
        self.earlier_seconds = known["elapsed_seconds"]
        warn_of_changes(known)
        if known["threads"] != torch.get_num_threads():
            log.warning("using %d threads, as the run did before", known["threads"])
            torch.set_num_threads(known["threads"])

    @property
    def logged_step(self) -> int:
        """The last step whose record is final."""
        return self.state.step - 1 if self.state.pending else self.state.step

    # the loop

    def loop(self, stream_from: Callable[[Cursor], Iterable[Step]]) -> None:
        """Steps until there is a reason to end."""
        if self.state.pending:
            self._after(json.loads(self.state.pending), self.state.reason)
        if self.state.reason:
            return
        for step, is_last in marked(stream_from(Cursor(**(self.state.cursor or {})))):
            began, worked = time.monotonic(), time.process_time()
            record = self._step(step)
            record["cpu_seconds"] = round(time.process_time() - worked, 6)
            record["step_seconds"] = round(time.monotonic() - began, 6)
            record["tokens_per_second"] = round(record["tokens"] / max(record["step_seconds"], 1e-6), 3)
            record["peak_bytes"] = int(self.world.most(peak_bytes(self.device)))
            record |= self.world.sent()
            self._after(record, self._reason(is_last))
            if self.state.reason:
                return
        raise DataError("there are no rows to train on", where="data.train")

    def _step(self, step: Step) -> Record:
        """One update and what it was like."""
        state, number = self.state, self.state.step + 1
        if self._enter(number):
            log.info("step %d: phase %d, %d tensors train", number, self.span.number, len(self.span.names))
        step, facts = self.sample(step, number) if self.sample else (step, {})
        batches = [self.collate(examples).to(self.device) for examples in step.micro_batches]
        spare = self.collate(step.spare).to(self.device) if self.layout.in_step and step.spare else None
        scaling = self.precision.scaling
        # a step that is left out takes nothing of the schedule
        lr = learning_rate(self.settings, number - (scaling.skipped_steps if scaling else 0), self.total_steps)
        self.policy.train(not self.objective.samples)  # dropout would make it another than the one that wrote
        try:
            loss = accumulate(
                self.objective, self.policy, batches, self.precision, self.layout, self._reseed(number), spare,
                forward=self.offload.forward, facts=facts,
            )  # fmt: skip
            self._penalise()
            first = number == self.resumed_step + 1
            if first:
                gradients_bytes = storage_bytes(self.layout.gradients())
            unreached = self.layout.reduce(self.span.names)
            fill_missing(self.optimizer.masters, first, unreached)
            norm = update(
                self.optimizer, self.precision, self.layout, lr=lr, clip=self.settings.clip, rows=batches,
                then=lambda: self.after_step(number, self.total_steps),
            )  # fmt: skip
        except DivergedError as error:
            raise self._diverged(error, number) from error
        finally:
            self.policy.train(False)
            self.precision.clear()
            self.layout.clear()
        if first:
            held = held_bytes(self.policy, self.precision, self.pieces, self.optimizer)
            held["offloaded_bytes"] += self.offload.spilled_bytes
            self.held_bytes = {**held, "gradients_bytes": gradients_bytes}
        counts = [(b.ids.numel(), b.row_count, b.targets.numel(), 1) for b in batches]
        sums = self.layout.data.sums([float(sum(count)) for count in zip((0, 0, 0, 0), *counts, strict=True)])
        tokens, rows, supervised, micro_batches = map(int, sums)
        state.step, state.cursor, state.epoch = number, asdict(step.cursor), step.epoch
        state.tokens, state.rows = state.tokens + tokens, state.rows + rows
        state.supervised_tokens += supervised
        for cause, count in step.dropped.items():
            state.dropped[cause] = state.dropped.get(cause, 0) + count
        self.weights_step = number
        if not math.isfinite(norm):
            log.warning("step %d: a gradient overflowed fp16; nothing was updated, the loss scale is halved", number)
        return {
            "step": number, "epoch": step.epoch, "loss": loss, "lr": lr, "grad_norm": norm, "rows": rows,
            "micro_batches": micro_batches, "tokens": tokens, "supervised_tokens": supervised,
            "total_tokens": state.tokens, **facts, **(scaling.record() if scaling else {}),
        }  # fmt: skip

    def _reseed(self, step: int) -> Callable[[int], object]:
        others = (self.world.rank,) if self.world.rank else ()
        # of all devices
        return lambda micro: torch.manual_seed(seed_for(self.settings.seed, "dropout", step, micro, *others))

    def _penalise(self) -> None:
        """What the method adds to the loss for the parameters' sake: once, whatever the number of processes."""
        more = self.penalty()
        if more is None:
            return
        if self.is_first:
            self.precision.backward(more)
        self.layout.passed()

    def _diverged(self, error: DivergedError, step: int) -> DivergedError:
        self.keeper.go_on(wait=True)
        step_saved, checkpoints = self.keeper.saved_step, self.keeper.checkpoints
        kept = f"the last checkpoint is {checkpoints.path(step_saved)}" if step_saved >= 0 else "nothing was saved yet"
        hint = f"lower train.lr, or look at these rows; {kept}"
        return DivergedError(f"step {step}: {error.message}", where=error.where, hint=hint)

    def _reason(self, is_last: bool) -> str:
        """Why the run is over after this step; empty when it is not."""
        state, settings = self.state, self.settings
        if state.step >= self.total_steps:
            return "steps" if settings.steps else "epochs"
        if is_last:
            return "epochs"
        if settings.tokens and state.tokens >= settings.tokens:
            return "tokens"
        if settings.minutes and self.world.most(self.seconds()) >= settings.minutes * 60:
            return "minutes"
        return ""

    # between steps

    def _after(self, record: Record, reason: str) -> None:
        """Evaluates, records, saves and stops, as each is due after a step."""
        state, is_best = self.state, False
        if self.examiner.is_due(state.step, is_over=bool(reason)):
            began = time.monotonic()
            metrics = None if self._asked() else self._metrics()
            if metrics is None:
                self._asked()
                self._save(pending=record, reason=reason)
                self.keeper.go_on(wait=True)
                raise self.signals.stopped(state.step)
            is_best, reason = self._judged(metrics, reason)
            record = {**record, **{f"eval_{name}": value for name, value in metrics.items()}}
            record["eval_seconds"] = round(time.monotonic() - began, 3)
        state.reason, state.pending = reason, ""
        self._tell(record)
        asked = self._asked()
        if reason or is_best or state.step % self.settings.save_every == 0 or asked:
            self._save()
        self.keeper.go_on(wait=bool(reason or asked))
        if asked:
            raise self.signals.stopped(state.step)

    def _asked(self) -> int:
        """The exit code of a signal to any of the processes; 0 while there was none."""
        asked = int(self.world.most(self.signals.exit_code))
        if asked:
            self.signals.exit_code = asked
        return asked

    def _metrics(self) -> dict[str, float] | None:
        try:
            return self.examiner.metrics(self.state.step, self.signals)
        except DivergedError as error:
            raise self._diverged(error, self.state.step) from error

    def _judged(self, metrics: dict[str, float], reason: str) -> tuple[bool, str]:
        stop = self.settings.stop
        if stop is None:
            return False, reason
        is_best = judge(stop, metrics, self.state)
        if not math.isfinite(metrics[stop.metric]):
            log.warning("step %d: %s is not a finite number; it cannot be the best", self.state.step, stop.metric)
        if self.state.bad_evaluations >= stop.patience:
            reason = reason or "stop"
        return is_best, reason

    def _tell(self, record: Record) -> None:
        if not self.is_first:
            return
        self.metrics.write(record)
        for observer in list(self.observers):
            try:
                observer(record)
            except OSError as error:
                log.warning("%s is switched off: %s", type(observer).__name__, error)
                self.observers.remove(observer)

    def _save(self, pending: Record | None = None, reason: str = "") -> None:
        """A checkpoint of now."""
        if pending:
            # as text, because the order of its fields is part of metrics.jsonl
            self.state.pending, self.state.reason = json.dumps(pending), reason
        if self.is_first:
            self.metrics.sync()
        self.state.updates = self.optimizer.updates
        self.state.scaling = asdict(self.precision.scaling) if self.precision.scaling else {}
        self.keeper.save(self.state, self.pieces, self.optimizer, self.seconds())

    def seconds(self) -> float:
        """Time that the run has taken, over all its processes."""
        return self.earlier_seconds + time.monotonic() - self.start

    # the end

    def take_best(self) -> None:
        """Makes the best weights the result, when there is a metric that says which these are."""
        best = self.state.best_step
        if best is None or best == self.state.step or not self.keeper.holds(best):
            return
        self.keeper.read_weights(self.pieces)
        self.layout.publish(self.precision, self.pieces)
        self.weights_step = best

    def result(self) -> Result:
        state, held = self.state, self.held_bytes | {"peak_bytes": peak_bytes(self.device)}
        return Result(
            step=state.step, reason=state.reason, weights_step=self.weights_step, best_value=state.best_value,
            tokens=state.tokens, supervised_tokens=state.supervised_tokens, rows=state.rows,
            dropped=dict(state.dropped), seconds=self.seconds(),
            peak_bytes=int(self.world.most(peak_bytes(self.device))),
            resumed_step=self.resumed_step, ranks=self.world.told(held | self.layout.facts()),
        )  # fmt: skip
