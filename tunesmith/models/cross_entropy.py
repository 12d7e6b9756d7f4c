"""Cross-entropy of a language head without the tokens x vocabulary matrix.

The one idea: a token's loss depends on its own hidden state alone, so with a frozen head the gradient of that state is
made in the forward, chunk by chunk, out of its logits and in their place; the backward only scales it. A head that
trains goes through `plain_losses`, which recomputes each chunk instead. Both are the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.kernels import products
from tunesmith.kernels.elementwise import cross_entropy_
from tunesmith.models.families import setting
from tunesmith.models.route import Owners, checkpoint_contexts

ROOM = 32 << 20  # bytes of logits that the fused head has in memory


@dataclass(frozen=True)
class Shaping:
    """What a family does to the product of hidden state and head.

    Attributes:
        scale: logits are multiplied by it (cohere; granite divides).
        cap: logits z become cap x tanh(z / cap) (gemma2); None leaves them.
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_none(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1.0 and self.cap is None

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits in float32; those of a float64 model stay float64."""
        logits = raw.to(wide(raw.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def shaping_of(config: Any) -> Shaping:
    """What the family does to logits, from its config."""
    scale = setting(config, "logit_scale")
    if scale is None:
        scale = 1.0 / float(setting(config, "logits_scaling") or 1.0)
    cap = setting(config, "final_logit_softcapping")
    return Shaping(float(scale), None if cap is None else float(cap))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and logits: float32, or float64 for a model in float64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(device: torch.device) -> int:
    """Rows of logits at a time, at least: every chunk reads the whole head, and an accelerator wants large products."""
    return 128 if device.type == "cpu" else 1024


def _chunk(rows: int, head: Tensor) -> int:
    """Rows of a chunk of the fused head: chunks of one size, as large as ROOM allows up to four times `chunk_rows`."""
    least = chunk_rows(head.device)
    most = min(4 * least, max(least, ROOM // (len(head) * head.element_size())))
    return -(-rows // -(-rows // most)) if rows else 1


def fused_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping) -> Tensor:
    """Negative log-likelihoods with a frozen head.

    Args:
        hidden: [rows, width], in the dtype of `weight`.
        weight: [vocabulary, width]; no gradient is made for it or for `bias`.
        targets: int64 [rows].

    Returns:
        [rows], float32 (float64 for a float64 model), differentiable in `hidden`.
    """
    losses: Tensor = _Fused.apply(hidden, weight, bias, targets, shaping)  # type: ignore[no-untyped-call]
    return losses


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping
    ) -> Tensor:
        losses = torch.empty(len(targets), dtype=wide(hidden.dtype), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _chunk(len(targets), weight)
        room = hidden.new_empty(rows, len(weight))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = products.nt(hidden[part], weight, bias=bias, out=room[: len(targets[part])])
            losses[part] = cross_entropy_(
                logits, targets[part], shaping.scale, shaping.cap, gradient=gradient is not None
            )
            if gradient is not None:
                products.nn(logits, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # the product in float32: the weight of a step can be large
        return (gradient * grads[0][:, None]).to(gradient.dtype), None, None, None, None


def plain_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    shaping: Shaping,
    owners: Sequence[int] | None = None,
) -> Tensor:
    """Negative log-likelihoods through any head, [rows] as `fused_losses`; logits live for one chunk at a time.

    Gradients reach `hidden`, the head's weights and its inserts; each chunk is computed again in the backward.

    Args:
        owners: the row of the route that each state is of, where the route has rows.
    """
    rows = chunk_rows(hidden.device) * 4  # a head's own gradient is as large as the head, once a chunk

    def losses(part: Tensor, wanted: Tensor, whose: Owners | None) -> Tensor:
        with nullcontext() if whose is None else whose.enter():
            return torch.nn.functional.cross_entropy(shaping(head(part)), wanted, reduction="none")

    parts = []
    for start in range(0, len(targets), rows):
        whose = None if owners is None else Owners(tuple(owners[start : start + rows]))
        part = hidden[start : start + rows], targets[start : start + rows], whose
        if torch.is_grad_enabled():
            parts.append(checkpoint(losses, *part, use_reentrant=False, context_fn=checkpoint_contexts))
        else:
            parts.append(losses(*part))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=wide(hidden.dtype))
