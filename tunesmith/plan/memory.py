"""Bytes of a training run, part by part: weights, master weights, gradients, optimizer state, activations.

The one idea: the tensors of the real adapted model are counted, so that no formula per family can be wrong; a model
on the meta device counts as well as one with data. Activations come from `trace`, or from the estimate here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ConfigError, did_you_mean
from tunesmith.core.moments import COPIED_BYTES, STATE_BYTES, moment_bytes
from tunesmith.plan.shape import ModelShape

if TYPE_CHECKING:
    import torch

# moments that each optimizer keeps for a trained number
MOMENTS = {"adamw": 2, "adam": 2, "lion": 1, "momentum": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}

# what a process takes beside its tensors once a model is loaded: torch 2.13 (CPU build), transformers 5.23, tokenizer
# and rows (VmHWM, x86-64 Linux, one thread); and what the allocator keeps of activations that were let go, as a share
# of these. Both fitted on the runs of `benchmarks/plan.py --fitted`, which are none of those that plans are judged by
IMPORTS_BYTES = 485_000_000
KEPT_SHARE = 0.46


Parts = dict[str, int]


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor of a model: what is needed to count it.

    Attributes:
        name: as in the state dict.
        shape: its sizes.
        item_bytes: bytes of one number.
        trainable: whether an optimizer moves it.
        buffer: it is state, not a parameter: it takes memory but is not counted as one.
        codes_bytes: what it takes where it is held as codes with their scales; 0 where it is held as numbers.
    """

    name: str
    shape: tuple[int, ...]
    item_bytes: int
    trainable: bool = False
    buffer: bool = False
    codes_bytes: int = 0

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def nbytes(self) -> int:
        return self.codes_bytes or self.count * self.item_bytes


@dataclass(frozen=True)
class Parameters:
    """How many numbers the model has, and how many of them are trained; shared ones count once."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a step, by part.

    Attributes:
        weights_bytes: everything the forward reads: parameters and buffers.
        master_bytes: float32 copies of trained weights kept in fewer bits.
        gradients_bytes: one number for each trained one.
        optimizer_bytes: moments.
        activations_bytes: the most that forward and backward hold at once for one micro-batch, gradients aside.
        overhead_bytes: what the process takes before any tensor: interpreter and libraries.
        offloaded_bytes: what waits outside memory (`train.offload`); in no other part, nor in the total.
        peak_bytes: the most that tensors take at one moment. Less than the total when gradients are not yet there
            while activations are; equal to it where that is not known.
        phases: bytes by part when tensors take most in each phase, where that is known: load, forward, backward, step,
            save; evaluate, write and score where there are any.
        checkpoint_bytes: what a checkpoint has of this process.
        cache_bytes: keys and values of answers that are written together; at other moments than activations.
    """

    weights_bytes: int
    master_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    overhead_bytes: int = IMPORTS_BYTES
    peak_bytes: int = 0
    offloaded_bytes: int = 0
    phases: dict[str, Parts] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    cache_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts at their largest, without the overhead of the process."""
        return self.state_bytes + self.activations_bytes + self.cache_bytes

    @property
    def state_bytes(self) -> int:
        """What does not depend on the batch: 16 bytes a parameter in full bf16 training with AdamW."""
        return self.weights_bytes + self.master_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def resident_bytes(self) -> int:
        """What the process takes at its fullest: libraries, tensors, what its allocator keeps, a file in the making.

        A checkpoint is put together in memory: of its two files, weights and moments, one at a time.
        """
        working = (self.peak_bytes or self.total_bytes) + round(KEPT_SHARE * self.activations_bytes)
        saving = sum(self.phases.get("save", {}).values()) + max(self.optimizer_bytes, self.gradients_bytes)
        return self.overhead_bytes + max(working, saving)

    def as_dict(self) -> dict[str, Any]:
        """The parts and their total, under the keys of plan.json."""
        return {
            "weights_bytes": self.weights_bytes,
            "master_bytes": self.master_bytes,
            "gradients_bytes": self.gradients_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "activations_bytes": self.activations_bytes,
            "cache_bytes": self.cache_bytes,
            "offloaded_bytes": self.offloaded_bytes,
            "total_bytes": self.total_bytes,
            "peak_bytes": self.peak_bytes or self.total_bytes,
            "overhead_bytes": self.overhead_bytes,
            "resident_bytes": self.resident_bytes,
            "phases": self.phases,
            # in no total: it is there for a moment, and not where it would be much
            "copied_bytes": self.checkpoint_bytes if self.checkpoint_bytes <= COPIED_BYTES else 0,
        }


def tensor_specs(model: torch.nn.Module, trainable: Iterable[torch.nn.Parameter] | None = None) -> list[TensorSpec]:
    """Every parameter and buffer of a model, shared ones once, on any device; also those that copies stand for.

    Args:
        trainable: the parameters that an optimizer gets; None takes those that require a gradient. Ones that are
            not inside the model are counted, too.
    """
    from tunesmith.models.copies import swaps

    chosen = None if trainable is None else {id(parameter): parameter for parameter in trainable}
    specs, seen = [], set()
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad if chosen is None else id(parameter) in chosen
        specs.append(_spec(name, parameter, trained))
        seen.add(id(parameter))
    # the base's own, where an adapter's copies have taken their places: on another route they act
    aside = {id(held): held for swap in swaps(model) for held in swap.base.values() if id(held) not in seen}
    specs += [_spec(f"base.{index}", held, False) for index, held in enumerate(aside.values())]
    outside = [] if chosen is None else [found for key, found in chosen.items() if key not in seen]
    specs += [_spec(f"outside.{index}", parameter, True) for index, parameter in enumerate(outside)]
    return specs + [_spec(name, buffer, False, buffer=True) for name, buffer in model.named_buffers()]


def count_parameters(specs: Iterable[TensorSpec]) -> Parameters:
    """Numbers in all and in trained parameters."""
    parameters = [spec for spec in specs if not spec.buffer]
    return Parameters(
        total=sum(spec.count for spec in parameters),
        trainable=sum(spec.count for spec in parameters if spec.trainable),
    )


def count_memory(
    specs: Iterable[TensorSpec],
    *,
    master: bool = True,
    fp32_gradients: bool = False,
    optimizer: str = "adamw",
    optimizer_state: str = "fp32",
    offload_optimizer: bool = False,
    activations_bytes: int = 0,
    peak_bytes: int = 0,
    overhead_bytes: int = IMPORTS_BYTES,
) -> Memory:
    """Memory of a step from the tensors of the adapted model.

    Args:
        master: trained weights of fewer than 32 bits have a float32 copy.
        fp32_gradients: the gradients of such weights are summed in float32, as our trainer does: 18 bytes a
            parameter where the usual account (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1) says 16.
        optimizer: a key of MOMENTS.
        optimizer_state: in what the moments are kept: fp32, bf16 or int8 (codes, and a scale for each 256; small
            tensors in fp32).
        offload_optimizer: master weights and moments are kept outside memory.

    Raises:
        ConfigError: the optimizer or its state is unknown.
    """
    moments = _known(MOMENTS, optimizer, "train.optimizer")
    _known(STATE_BYTES, optimizer_state, "train.optimizer_state")
    specs = list(specs)
    trained = [spec for spec in specs if spec.trainable]
    least = 4 if master and fp32_gradients else 1
    master_bytes = sum(4 * spec.count for spec in trained if spec.item_bytes < 4) if master else 0
    optimizer_bytes = moments * sum(moment_bytes(spec.count, optimizer_state) for spec in trained)
    return Memory(
        weights_bytes=sum(spec.nbytes for spec in specs),
        master_bytes=0 if offload_optimizer else master_bytes,
        gradients_bytes=sum(spec.count * max(least, spec.item_bytes) for spec in trained),
        optimizer_bytes=0 if offload_optimizer else optimizer_bytes,
        activations_bytes=activations_bytes,
        overhead_bytes=overhead_bytes,
        peak_bytes=peak_bytes,
        offloaded_bytes=master_bytes + optimizer_bytes if offload_optimizer else 0,
        checkpoint_bytes=sum(spec.count * (4 if master else spec.item_bytes) for spec in trained) + optimizer_bytes,
    )


def estimate_activations(
    shape: ModelShape,
    tokens: int,
    supervised: int,
    *,
    item_bytes: int = 2,
    recompute: bool = False,
    chunk: int = 128,
) -> int:
    """Bytes that a forward keeps for the backward: an estimate, for where no model can be traced.

    Counts the inputs of every matrix and of every pointwise function that needs its own, in a block without a fused
    attention matrix (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without the score terms), and two
    float32 copies of the logits of one chunk of the head.
    """
    width = shape.n_heads * shape.d_head + 2 * shape.n_kv_heads * shape.d_head
    inner = (4 if shape.gated else 2) * shape.d_mlp
    block = tokens * item_bytes * (7 * shape.d_model + width + inner)
    kept = shape.n_layers * tokens * item_bytes * shape.d_model + block if recompute else shape.n_layers * block
    return kept + min(supervised, chunk) * shape.vocab * 4 * 2


def _spec(name: str, tensor: torch.Tensor, trainable: bool, buffer: bool = False) -> TensorSpec:
    from tunesmith.kernels.quantized import Quantized

    held = tensor.held_bytes if isinstance(tensor, Quantized) else 0
    return TensorSpec(name, tuple(tensor.shape), tensor.element_size(), trainable, buffer, held)


def _known(table: dict[str, int], name: str, where: str) -> int:
    if name not in table:
        known = " ".join(table)
        raise ConfigError(f"{name!r} is unknown; there are {known}", where=where, hint=did_you_mean(name, table))
    return table[name]
