"""Tensors of a model folder in another dtype than they are stored in, without holding both.

What is stored in the wanted dtype is mapped into memory by transformers as it is. What has to be cast is read here
tensor by tensor: a file that is mapped once for all would count as memory until the last one is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def cast_state(
    files: Iterable[Path], dtype: torch.dtype, keep: Collection[str] = (), left_out: Collection[str] = ()
) -> dict[str, Tensor] | None:
    """All tensors with floating-point ones in `dtype`, or None where most are stored in it already.

    Args:
        keep: modules whose tensors stay as they are stored.
        left_out: stored names of tensors that are read by someone else; zeros that take no memory stand for them.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            stored = [file.get_slice(name).get_dtype() for name in names]
        if not left_out and 2 * stored.count(STORED[dtype]) > len(names):
            return None
        for name in names:
            if name in left_out:
                with safe_open(path, "pt") as file:
                    found[name] = torch.zeros((), dtype=dtype).expand(file.get_slice(name).get_shape())
                continue
            with safe_open(path, "pt") as file:  # anew each time: its pages are given back
                tensor: Tensor = file.get_tensor(name)
                cast = tensor.is_floating_point() and not set(keep) & set(name.split("."))
                found[name] = tensor.to(dtype) if cast else tensor.clone()
                del tensor
    return found
