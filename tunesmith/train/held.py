"""Bytes that a process holds of each part of the state, counted from storages: what a plan is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.kernels.quantized import Quantized
from tunesmith.train.apart import ApartAdamW

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.train.optim import Optimizer
    from tunesmith.train.precision import Precision


def held_bytes(policy: Any, precision: Precision, pieces: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, int]:
    """Weights, master weights and moments of one process, and what of the last two it keeps apart."""
    model = getattr(policy, "model", None)
    weights = [*precision.parameters.values(), *(model.parameters() if model is not None else ())]
    masters = storage_bytes([*precision.masters.values(), *pieces.values()], apart_from=weights)
    moments = storage_bytes(optimizer.state().values())
    apart = isinstance(optimizer, ApartAdamW)
    return {
        "weights_bytes": storage_bytes(weights),
        "master_bytes": 0 if apart else masters,
        "optimizer_bytes": 0 if apart else moments,
        "offloaded_bytes": masters + moments if apart else 0,
    }


def storage_bytes(tensors: Iterable[Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages of some tensors, each once, without those that other tensors lie in, too."""
    known = set(_storages(apart_from))
    return sum(size for address, size in _storages(tensors).items() if address not in known)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [held.untyped_storage() for tensor in tensors for held in _held(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _held(tensor: Tensor) -> Iterable[Tensor]:
    """The ordinary tensors that hold one: this process's of a tensor in parts, codes and scales of a quantised one."""
    if isinstance(tensor, Quantized):
        return tensor.parts.values()
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor]
