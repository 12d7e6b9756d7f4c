"""One update, complete: sums over micro-batches, one division, one norm, one step of the optimizer.

Nothing here knows about files, time or signals; `trainer.py` calls it once a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch

from tunesmith.core.errors import DataError, DivergedError, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.core.types import Batch
    from tunesmith.objectives.objective import Objective, Policy
    from tunesmith.parallel.layout import Layout
    from tunesmith.train.optim import Optimizer
    from tunesmith.train.precision import Precision

log = logging.getLogger(__name__)
T = TypeVar("T")


def accumulate(
    objective: Objective,
    policy: Policy,
    batches: Sequence[Batch],
    precision: Precision,
    layout: Layout,
    reseed: Callable[[int], object] = lambda micro: None,
    spare: Batch | None = None,
    forward: Callable[[], AbstractContextManager[None]] = nullcontext,
    facts: dict[str, float] | None = None,
) -> float:
    """Adds the gradient of a step to the masters and answers its loss, the mean over the units of all batches.

    The division is by the weight of all micro-batches of all processes, so that neither how a step is cut nor
    how its units are spread changes the result. `reseed(micro)` is called before each forward pass.

    Args:
        spare: what is computed, and weighs nothing, where all processes must compute at once and this one has done.
        forward: what each forward pass runs in; its backward follows it.
        facts: gets what else the objective has seen, as means over the same units.

    Raises DataError when the step has no units, DivergedError when its loss is not finite.
    """
    weights = [objective.weight(batch) for batch in batches]
    weight = layout.sum(sum(weights))
    if weight <= 0:
        raise DataError(
            f"nothing in this step is supervised; its rows are {layout.world.named(named_rows(batches))}",
            where="data.train",
            hint="do these rows have a completion, and does it survive data.max_length?",
        )
    taught = [(micro, batch) for micro, batch in enumerate(batches) if weights[micro]]
    seen: list[Mapping[str, Tensor]] = []
    alone = layout.world.size == 1
    if alone and len(taught) > 1:
        precision.make_room()
    # a parameter that processes share has no memory between its passes
    with precision.laid.unchanging() if alone else nullcontext():
        if layout.passes is None:
            totals = _one_by_one(objective, policy, taught, weight, precision, layout, reseed, spare, forward, seen)
        else:
            totals = layout.passes(objective, [batch for _, batch in taught], weight, reseed, spare)
    # read once a step: an accelerator need not wait for each micro-batch
    values = torch.stack(totals).double().tolist() if totals else []
    wrong = [batch for (_, batch), value in zip(taught, values, strict=True) if not math.isfinite(value)]
    loss = layout.sum(math.fsum(values) if not wrong else math.nan) / weight
    if not math.isfinite(loss):
        raise DivergedError(f"the loss is not a finite number; rows {layout.world.named(named_rows(wrong))}")
    if facts is not None:
        for name in dict.fromkeys(name for one in seen for name in one):
            facts[name] = layout.sum(math.fsum(float(one[name]) for one in seen)) / weight
    return loss


def _one_by_one(
    objective: Objective,
    policy: Policy,
    taught: Sequence[tuple[int, Batch]],
    weight: float,
    precision: Precision,
    layout: Layout,
    reseed: Callable[[int], object],
    spare: Batch | None,
    forward: Callable[[], AbstractContextManager[None]],
    seen: list[Mapping[str, Tensor]],
) -> list[Tensor]:
    """The passes of a step, one micro-batch after the other, and their totals; their facts go into `seen`."""
    totals: list[Tensor] = []
    for turn in range(int(layout.world.most(len(taught)))):
        if turn < len(taught):
            micro, batch = taught[turn]
            reseed(micro)
            with forward():
                found = objective.loss(policy, batch)
            precision.backward(found.total / weight)
            totals.append(found.total.detach())
            seen.append(found.facts)
            del found  # with it the nodes of its graph, which would lie between the tensors of the next
        elif layout.in_step and spare is not None:
            precision.backward(objective.loss(policy, spare).total * 0.0)
        layout.passed()
    return totals


def fill_missing(masters: dict[str, nn.Parameter], first: bool, unreached: Collection[str] | None = None) -> None:
    """Gives zero gradients to tensors that no loss reached, naming them once.

    They stay in the optimizer's step, so that one counter serves all. Raises ModelError when none was reached.

    Args:
        unreached: what no process's loss reached, as `Layout.reduce` answers; None looks at the tensors here.
    """
    missing = (
        [name for name, master in masters.items() if master.grad is None] if unreached is None else sorted(unreached)
    )
    if len(missing) == len(masters):
        raise ModelError(f"no gradient reaches anything that is declared trainable ({_some(missing)})", where="method")
    if missing and first:
        log.warning("no gradient reaches %d trainable tensors: %s", len(missing), _some(missing))
    for name in missing:
        if masters[name].grad is None:
            masters[name].grad = torch.zeros_like(masters[name])


def update(
    optimizer: Optimizer,
    precision: Precision,
    layout: Layout,
    *,
    lr: float,
    clip: float,
    rows: Sequence[Batch] = (),
    then: Callable[[], None] = lambda: None,
) -> float:
    """Unscales, clips, steps, publishes and frees the gradients; answers the norm before clipping.

    `then` is called once parameters have moved, while the gradients are still there. Where the loss is scaled and the
    norm is not finite, the factor is lowered, nothing else changes, and `then` is not called.

    Raises DivergedError when the norm is not finite and that is not the factor's doing, before anything has changed.
    """
    gradients = [master.grad for master in optimizer.masters.values() if master.grad is not None]
    scaling = precision.scaling
    if scaling is not None:
        scaling.unscale(gradients)
    norm = float(layout.norm(gradients))
    overflowed = not math.isfinite(norm)
    if overflowed and (scaling is None or not scaling.can_fall):
        raise DivergedError(
            f"the norm of the gradient is not a finite number; rows {layout.world.named(named_rows(rows))}"
        )
    if scaling is not None:
        scaling.adjust(overflowed)
    if overflowed:
        layout.clear()
        precision.clear()
        return norm
    if clip and norm > clip:
        torch._foreach_mul_(gradients, clip / norm)
    optimizer.step(lr)
    layout.publish(precision, optimizer.masters)
    then()
    precision.clear()
    layout.clear()
    return norm


def marked(steps: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each step with whether it is the last one, so that the last one can be evaluated and saved as such."""
    iterator = iter(steps)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following


def named_rows(batches: Sequence[Batch], limit: int = 8) -> str:
    """The rows of some batches, for a message."""
    return _some([row for batch in batches for row in batch.rows], limit)


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
