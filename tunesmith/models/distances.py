"""How far a student's next-token distributions are from a teacher's, without the tokens x vocabulary matrix.

The one idea: a position's distance depends on its own states alone, so positions go through the heads chunk by chunk;
with a frozen head the gradient of the states is made at once (as in `cross_entropy.py`), else chunks are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tunesmith.core.errors import ConfigError
from tunesmith.core.types import Likeliest
from tunesmith.models.cross_entropy import chunk_rows
from tunesmith.models.modes import evaluating
from tunesmith.models.route import checkpoint_contexts

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.policy import Policy

Losses = Callable[[Tensor, slice], Tensor]
Both = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
Route = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Distance:
    """A divergence between two distributions over the same outcomes, in nats; 0 where they are equal.

    With p the teacher's and q the student's probabilities, both softmax(logits / temperature):

    - forward: KL(p || q), Hinton et al. 2015 (arXiv 1503.02531);
    - reverse: KL(q || p), Gu et al. 2023 (arXiv 2306.08543);
    - jsd: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, Agarwal et al. 2023 (arXiv 2306.13649,
      eq. 1). Divided by beta it goes to forward as beta goes to 0, by 1 - beta to reverse as beta goes to 1.
    """

    kind: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float = 0.5
    temperature: float = 1.0

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Distances [rows] of log-probabilities [rows, outcomes]."""
        if self.kind == "forward":
            return _kl(teacher, student)
        if self.kind == "reverse":
            return _kl(student, teacher)
        share = torch.tensor(self.beta, dtype=student.dtype, device=student.device)
        middle = torch.logaddexp(teacher + share.log(), student + torch.log1p(-share))
        return self.beta * _kl(teacher, middle) + (1 - self.beta) * _kl(student, middle)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most probable outcomes of logits [rows, vocabulary]: their places [rows, count], and log-probabilities
    [rows, count + 1] of each and of all others together."""
    places = logits.topk(count, dim=-1).indices
    return places, coarse(logits, places)


def coarse(logits: Tensor, places: Tensor) -> Tensor:
    """Log-probabilities [rows, count + 1] of some outcomes [rows, count], and of all others as one, the last.

    A divergence of what is made coarse so is never above that of the whole (the data processing inequality).
    """
    whole = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, places), others], -1) - whole


@torch.no_grad()
def ask(teacher: Policy, batch: Batch, count: int, temperature: float) -> Likeliest:
    """What a teacher holds most probable at every supervised position, to be kept. Raises ConfigError for a `count`
    that leaves nothing of its vocabulary."""
    with evaluating(teacher.model):
        hidden = teacher.hidden(batch, batch.sources)
    found = []
    for rows in _slices(hidden):
        with teacher.route.enter():
            logits = teacher.head_logits(hidden[rows]) / temperature
        if count >= logits.shape[-1]:
            told = f"{count} is not below the vocabulary, {logits.shape[-1]}"
            raise ConfigError(told, where="objective.top_k", hint="leave it out to ask for all")
        found.append(likeliest(logits, count))
    places, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Likeliest(places.int(), logprobs.float())


def taught(student: Policy, teacher: Policy | None, batch: Batch, distance: Distance, hard: float) -> Tensor:
    """What a student has to learn at every supervised position, in one forward pass.

    Args:
        teacher: the model that teaches, without a gradient; None where `batch.likeliest` has what it said.
        hard: share of the negative log-likelihood of the target in what is learnt.

    Returns:
        Float32 (float64 for a float64 model) [3, supervised]: (1 - hard) temperature^2 distance + hard loss, which is
        differentiable in what trains of the student; the distance; the loss. The square is Hinton's: gradients of
        softened distributions shrink with it. Where one head has more rows than the other (padding of the embedding),
        only those that both have count in the distance.
    """
    # before the student, whose activations are then not yet held
    said = _stored(batch.likeliest) if teacher is None else _asked(teacher, batch, distance.temperature)
    hidden = student.hidden(batch, batch.sources)

    def losses(part: Tensor, rows: slice) -> Tensor:
        logits = student.head_logits(part)
        distances = distance(*said(logits / distance.temperature, rows))
        targets = cross_entropy(logits, batch.targets[rows], reduction="none")
        learnt = (1 - hard) * distance.temperature**2 * distances + hard * targets
        return torch.stack([learnt, distances.detach(), targets.detach()])

    return by_chunks(hidden, losses, frozen=student.has_frozen_head, route=student.route.enter)


def _asked(teacher: Policy, batch: Batch, temperature: float) -> Both:
    """What a teacher says that reads the batch, beside what the student does."""
    with torch.no_grad(), evaluating(teacher.model):
        states = teacher.hidden(batch, batch.sources)

    def both(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), teacher.route.enter():
            said = teacher.head_logits(states[rows]) / temperature
        outcomes = min(said.shape[-1], logits.shape[-1])
        return said[:, :outcomes].log_softmax(-1), logits[:, :outcomes].log_softmax(-1)

    return both


def _stored(known: Likeliest | None) -> Both:
    """The same from what the teacher said before."""
    assert known is not None

    def both(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return known.logprobs[rows].to(logits.dtype), coarse(logits, known.places[rows].long())

    return both


def by_chunks(hidden: Tensor, losses: Losses, *, frozen: bool, route: Route = nullcontext) -> Tensor:
    """What a function says of states [rows, width], some at a time: [kinds, rows], of which the first is learnt.

    Args:
        losses: gives [kinds, n] for n states and their place in all; what it says of one depends on that one alone.
        frozen: nothing but the states gets a gradient.
        route: entered around every call.
    """
    if frozen:
        found: Tensor = _AtOnce.apply(hidden, losses, route)  # type: ignore[no-untyped-call]
        return found
    parts = []
    for rows in _slices(hidden):
        with route():
            if torch.is_grad_enabled():
                how: Any = {"use_reentrant": False, "context_fn": checkpoint_contexts}
                parts.append(checkpoint(losses, hidden[rows], rows, **how))
            else:
                parts.append(losses(hidden[rows], rows))
    return torch.cat(parts, -1)


def _slices(hidden: Tensor) -> list[slice]:
    rows = chunk_rows(hidden.device)
    return [slice(start, start + rows) for start in range(0, max(1, len(hidden)), rows)]


class _AtOnce(torch.autograd.Function):
    """The gradient of what is learnt with respect to its state, made in the forward; the backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Losses, route: Route) -> Tensor:
        learns = ctx.needs_input_grad[0]
        parts: list[Tensor] = []
        gradients: list[Tensor] = []
        for rows in _slices(hidden):
            with route(), torch.set_grad_enabled(learns):
                part = hidden[rows].detach().requires_grad_(learns)
                said = losses(part, rows)
                parts.append(said.detach())
                if learns:
                    gradients += torch.autograd.grad(said[0].sum(), part)
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # the product in float32: the weight of a step can be large
        return (gradient * grads[0][0][:, None]).to(gradient.dtype), None, None
