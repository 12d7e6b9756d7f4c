"""Activation recomputation: a block keeps its inputs and runs again in the backward.

The one idea: the second run enters the route and the segments of the first and draws the same dropout, so that the
gradients are the same bits. Works for every family whose blocks are known, with no support from its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunesmith.models.route import checkpoint_contexts


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Makes blocks keep only their inputs while gradients are wanted. Twice is the same as once."""
    for block in blocks:
        if "forward" not in block.__dict__:
            block.forward = partial(again, block.forward)


def keep(blocks: Iterable[nn.Module]) -> None:
    """Undoes `recompute`."""
    for block in blocks:
        block.__dict__.pop("forward", None)


def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs something now, and once more in the backward instead of keeping what it made."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    run = partial(forward, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, context_fn=checkpoint_contexts)
