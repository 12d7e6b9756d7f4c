"""The plan of a run: how many parameters, how many bytes, how many FLOPs, how long, before anything is paid.

`make_plan` takes the adapted model (meta or real) and the sizes of the work, not a config, so that any program can
ask. Showing a plan in the terminal is in `show`, counting in `memory`, `trace` and `compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.plan.calibration import Calibration, step_seconds
from tunesmith.plan.compute import flops_per_token
from tunesmith.plan.memory import (
    Memory,
    Parameters,
    Parts,
    TensorSpec,
    count_memory,
    count_parameters,
    estimate_activations,
    tensor_specs,
)
from tunesmith.plan.moments import Moment, Moments
from tunesmith.plan.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from tunesmith.core.problem import ProblemKind
    from tunesmith.core.types import Batch
    from tunesmith.plan.foreseen import Met, Seen
    from tunesmith.plan.trace import Traced


@dataclass(frozen=True)
class Workload:
    """How much there is to do.

    Attributes:
        steps: optimizer updates.
        tokens: read by all of them, prompts included.
        lengths: tokens of the documents of the largest micro-batch.
        supervised_share: tokens with a target / tokens.
        predicts: what a head predicts; None where text is learnt.
        passes: micro-batches of the run; 0 where all are as large as the largest.
        met: micro-batches of which one is the fullest moment of the run; none makes one of the lengths.
        judged: what is evaluated at once, where the loss is.
        answers: documents of each row, where answers are compared.
    """

    steps: int
    tokens: int
    lengths: tuple[int, ...]
    supervised_share: float = 1.0
    predicts: ProblemKind | None = None
    passes: float = 0.0
    met: tuple[Met, ...] = ()
    judged: Seen | None = None
    answers: tuple[int, ...] = ()

    @property
    def micro_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def context(self) -> float:
        """Tokens of the document that a token lies in, on average over tokens."""
        return sum(length * length for length in self.lengths) / max(1, self.micro_tokens)


@dataclass(frozen=True)
class Plan:
    """What a run will need; `as_dict` is plan.json.

    Attributes:
        parameters: numbers in all, and trained.
        memory: bytes by part.
        steps, tokens: the amount of training.
        flops: of all steps, forward and backward.
        seconds: None where the machine has not been measured.
        exact_activations: they were traced through the model rather than estimated from its shape.
        recompute: what is computed again in the backward, where that was chosen (`choice.Choice`); else None.
        layout: processes and what each sends, where there are several (`spread.Spread`); memory is then of one.
        writing: {tokens, rows_at_once, seconds} of completions that the run learns from, part of the work; else None.
        line: bytes by part while the fullest micro-batch runs, for a picture; not in plan.json.
    """

    parameters: Parameters
    memory: Memory
    steps: int
    tokens: int
    flops: int
    seconds: float | None = None
    exact_activations: bool = False
    recompute: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    writing: dict[str, Any] | None = None
    line: tuple[Parts, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers under the fixed keys."""
        return {
            "parameters": {"total": self.parameters.total, "trainable": self.parameters.trainable},
            "memory": self.memory.as_dict(),
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "activations": "traced" if self.exact_activations else "estimated",
            "recompute": self.recompute,
            "layout": self.layout,
            "writing": self.writing,
        }


def make_plan(
    model: torch.nn.Module,
    shape: ModelShape,
    work: Workload,
    *,
    trainable: Iterable[torch.nn.Parameter] | None = None,
    loss: Callable[[Batch], torch.Tensor] | None = None,
    master: bool = True,
    fp32_gradients: bool = True,
    optimizer: str = "adamw",
    optimizer_state: str = "fp32",
    offload_optimizer: bool = False,
    calibration: Calibration | None = None,
    item_bytes: int | None = None,
    recompute: bool = False,
) -> Plan:
    """The plan of a run of an adapted model.

    Args:
        model: with its adapter attached; on meta, or with data.
        shape: its sizes, for what is not traced.
        trainable: what the optimizer gets; None takes what requires a gradient.
        loss: gives the loss of a batch as a scalar with the model above; with it, activations and FLOPs are traced
            through the real forward and backward instead of estimated.
        master: trained weights of fewer than 32 bits have a float32 copy.
        fp32_gradients: and their gradients are summed in float32, as the trainer does.
        offload_optimizer: master weights and moments are kept outside memory.
        calibration: how fast the machine is; None leaves `seconds` out.
        item_bytes: of an activation, for the estimate; None takes the size of the largest weight's numbers.
        recompute: activations of a block are computed again in the backward, for the estimate.
    """
    specs = tensor_specs(model, trainable)
    state = count_memory(
        specs,
        master=master,
        fp32_gradients=fp32_gradients,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        offload_optimizer=offload_optimizer,
    )
    if loss is not None:
        from tunesmith.plan.foreseen import Met, Seen
        from tunesmith.plan.trace import sample_batch, trace_evaluation, trace_seen

        sample = Met(Seen(sample_batch(work.lengths, work.supervised_share, work.predicts, work.answers)))

        def traced(one: Met) -> Traced:
            return trace_seen(model, loss, one.seen, wide_gradients=master and fp32_gradients)

        evaluated = None if work.judged is None else trace_evaluation(model, loss, work.judged)
        moments = Moments(state, traced, work.met or (sample,))
        return _traced(specs, state, shape, work, moments, evaluated, calibration)
    size = item_bytes or max(specs, key=lambda spec: spec.count).item_bytes
    learnt = round(work.micro_tokens * work.supervised_share)
    activations = estimate_activations(shape, work.micro_tokens, learnt, item_bytes=size, recompute=recompute)
    flops = round(_estimated_flops(specs, shape, work) * work.tokens * (4 / 3 if recompute else 1))
    return Plan(
        parameters=count_parameters(specs),
        memory=replace(state, activations_bytes=activations),
        steps=work.steps,
        tokens=work.tokens,
        flops=flops,
        seconds=flops / calibration.flops_per_second if calibration else None,
    )


def _traced(
    specs: list[TensorSpec],
    state: Memory,
    shape: ModelShape,
    work: Workload,
    moments: Moments,
    evaluated: Traced | None,
    calibration: Calibration | None,
) -> Plan:
    fullest = moments.fullest()
    weights, master = {"weights": state.weights_bytes}, {"master": state.master_bytes}
    kept = {**weights, **master, "optimizer": state.optimizer_bytes}
    phases = {
        "load": weights,
        "forward": fullest.forward,
        "backward": fullest.backward,
        "step": {**kept, "gradients": state.gradients_bytes},
        "save": kept,
    }
    if evaluated is not None:
        phases["evaluate"] = {**kept, "activations": evaluated.activations_bytes}
    traced = fullest.traced
    times = work.tokens / max(1, traced.tokens)
    activations, peak = traced.activations_bytes, max(sum(parts.values()) for parts in phases.values())
    return Plan(
        parameters=count_parameters(specs),
        memory=replace(state, activations_bytes=activations, peak_bytes=peak, phases=phases),
        steps=work.steps,
        tokens=work.tokens,
        flops=round(traced.flops * times),
        seconds=_seconds(specs, state, shape, work, fullest, calibration) if calibration else None,
        exact_activations=True,
        line=fullest.line(),
    )


def _seconds(
    specs: list[TensorSpec],
    state: Memory,
    shape: ModelShape,
    work: Workload,
    moment: Moment,
    calibration: Calibration,
) -> float:
    traced, times = moment.traced, work.tokens / max(1, moment.traced.tokens)
    trained = sum(spec.nbytes for spec in specs if spec.trainable)
    update = trained + state.master_bytes + state.gradients_bytes + state.optimizer_bytes + state.offloaded_bytes
    head = 0.0 if work.predicts else 4.0 * shape.head_parameters * moment.learnt_tokens
    starting = traced.operations * calibration.operation_seconds
    computing = step_seconds(traced, calibration, min(head, traced.flops)) - starting
    updating = 2 * work.steps * update / calibration.bytes_per_second  # read and written
    return computing * times + starting * (work.passes or times) + updating


def _estimated_flops(specs: list[TensorSpec], shape: ModelShape, work: Workload) -> float:
    parameters = count_parameters(specs)
    whole = shape.matrix_parameters + shape.head_parameters * (1 if shape.tied else 2)
    inserted = max(0, parameters.total - whole) if parameters.trainable < parameters.total / 2 else 0
    return flops_per_token(
        shape,
        trained=min(parameters.trainable, shape.matrix_parameters + inserted),
        inserted=min(inserted, parameters.trainable),
        context=work.context,
        supervised_share=work.supervised_share,
        head_trained=parameters.trainable > parameters.total / 2,
    ).total
