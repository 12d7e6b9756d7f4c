"""Forward and backward of the real model without data: what they hold at once, and what they compute.

The one idea: a model on the meta device, made to answer as if on the CPU, runs the very operations of a step; one
dispatch mode counts the storages alive and the work. The same mode counts a run that has data, so that predicted and
measured mean one thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tunesmith.core.problem import ProblemKind
from tunesmith.core.types import Batch
from tunesmith.kernels.build import counted, imitated
from tunesmith.kernels.quantized import Quantized
from tunesmith.models.shared import foreseen
from tunesmith.plan.foreseen import Seen

aten = torch.ops.aten
_CURVED = {
    "gelu", "gelu_backward", "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "silu",
    "silu_backward", "tanh", "exp", "erf", "sigmoid",
}  # fmt: skip
_DRAWN = {"bernoulli_", "bernoulli", "native_dropout", "uniform_", "normal_"}
_POINTS = 240  # of a line of memory that is kept


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside it that are alive, and the work of each operation.

    Views share a storage and count once; what existed before counts nothing. Works on any device, fake or real.

    Attributes:
        now_bytes: alive now, without what `release` named.
        peak_bytes: the most alive at once, without what `release` named.
        peak_all_bytes: the most alive at once, with it.
        released_bytes: what `release` named; `released_at_peak_bytes` of it when `peak_all_bytes` was reached.
        flops: multiplications and additions of matrix products and attention; one multiply-add is two.
        traffic_bytes: bytes that all other operations read and write.
        curved, drawn: numbers that exponentials and the like give, and those drawn at random: dearer than their bytes.
        expanded: numbers that were made of codes.
        line: (`now_bytes`, `released_bytes`) each time that a storage was made.
        operations: how many there were, views aside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = self.peak_all_bytes = 0
        self.released_bytes = self.released_at_peak_bytes = 0
        self.flops = self.traffic_bytes = self.operations = self.curved = self.drawn = self.expanded = 0
        self.line: list[tuple[int, int]] = []
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # what shares an input's storage is nothing new, be the input counted or from before
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        # codes are nothing new either: only what is made of them is
        produced = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not isinstance(leaf, Quantized)]
        for tensor in produced:
            if tensor.untyped_storage()._cdata not in known:
                self._hold(tensor)
        if produced and not func.is_view:
            self._work(func, args, kwargs, out, produced)
        return out

    def add_flops(self, flops: int) -> None:
        """Counts work of a kernel that is no operation of torch's."""
        self.flops += flops
        self.operations += 1

    def add_expanded(self, numbers: int) -> None:
        """Counts numbers that are made of codes."""
        self.expanded += numbers

    def release(self, tensor: Tensor, item_bytes: int = 0) -> None:
        """Counts a storage apart from now on: a gradient that has become one.

        Args:
            item_bytes: of the numbers that are kept of it in a storage of their own, where that is not this one.
        """
        storage = tensor.untyped_storage()
        if self._alive.pop(storage._cdata, None) is not None:
            if item_bytes > tensor.element_size():
                self.released_bytes += item_bytes * tensor.numel()
                self._see()
            else:
                self.released_bytes += storage.nbytes()
            self.now_bytes -= storage.nbytes()

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, partial(self._drop, key, size))
        self.now_bytes += size
        self._see()

    def _see(self) -> None:
        self.line.append((self.now_bytes, self.released_bytes))
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        if self.now_bytes + self.released_bytes > self.peak_all_bytes:
            self.peak_all_bytes = self.now_bytes + self.released_bytes
            self.released_at_peak_bytes = self.released_bytes

    def _drop(self, key: int, size: int, reference: weakref.ref[Any]) -> None:
        if self._alive.get(key) is reference:
            del self._alive[key]
            self.now_bytes -= size

    def _work(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, produced: list[Tensor]) -> None:
        flops = _flops(func, args, kwargs, out)
        self.flops += flops
        self.operations += 1
        if not flops:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.traffic_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *produced))
            name = func._overloadpacket.__name__
            self.curved += produced[0].numel() if name in _CURVED else 0
            self.drawn += produced[0].numel() if name in _DRAWN else 0


@dataclass(frozen=True)
class Traced:
    """What one micro-batch does.

    Attributes:
        activations_bytes: the most that forward and backward hold at once, weights and finished gradients aside.
        peak_bytes: the same with finished gradients.
        forward_peak_bytes: the most that the forward holds at once.
        finished_bytes: finished gradients at the peak.
        line: activations and finished gradients over the operations, at most so many points, the fullest of each span.
        saved_bytes: alive after the forward: what the backward needs.
        forward_flops, backward_flops: work of each direction.
        traffic_bytes: bytes read and written outside matrix products, both directions.
        curved, drawn, expanded: numbers made by exponentials and the like, at random, and of codes, both directions.
        operations: number of operations, both directions.
        tokens: in the micro-batch.
    """

    activations_bytes: int
    peak_bytes: int
    saved_bytes: int
    forward_flops: int
    backward_flops: int
    traffic_bytes: int
    operations: int
    tokens: int
    forward_peak_bytes: int = 0
    finished_bytes: int = 0
    curved: int = 0
    drawn: int = 0
    expanded: int = 0
    line: tuple[tuple[int, int], ...] = ()

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


def trace(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    lengths: Sequence[int],
    supervised_share: float = 1.0,
    predicts: ProblemKind | None = None,
    answers: tuple[int, ...] = (),
) -> Traced:
    """Runs `loss` and its backward on a micro-batch of documents of these lengths, with labels where it `predicts`,
    of rows of so many `answers` where these are compared.

    The model may be on meta or hold data; it is as before afterwards. `loss` gives a scalar. A device other than
    the CPU is not imitated: kernels that save other tensors there will differ.
    """
    return trace_seen(model, loss, Seen(sample_batch(lengths, supervised_share, predicts, answers)))


def trace_seen(
    model: nn.Module, loss: Callable[[Batch], Tensor], seen: Seen, *, wide_gradients: bool = False
) -> Traced:
    """The same for a micro-batch of real rows.

    Args:
        wide_gradients: as in `measure`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _as_if_on_cpu(model, fake), imitated():
        known = seen.faked(fake)
        with foreseen(known.compact):
            return measure(model, lambda: loss(known.batch), len(seen.batch.ids), wide_gradients=wide_gradients)


def trace_evaluation(model: nn.Module, loss: Callable[[Batch], Tensor], seen: Seen) -> Traced:
    """The same in evaluation mode, without a backward; the model is in the mode it was in afterwards."""

    def judged(batch: Batch) -> Tensor:
        with torch.no_grad():
            return loss(batch)

    trained = model.training
    model.eval()
    try:
        return trace_seen(model, judged, seen)
    finally:
        model.train(trained)


def measure(model: nn.Module, loss: Callable[[], Tensor], tokens: int, *, wide_gradients: bool = False) -> Traced:
    """Counts one forward and backward where the model is, data or not; leaves gradients as backward does.

    Args:
        wide_gradients: finished gradients are counted as summed in float32, as the trainer does for masters.
    """
    with LiveStorages() as live, counted(live.add_flops, live.add_expanded):
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda found: _release(live, found.grad, 4 * wide_gradients))
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        try:
            total = loss()
            saved, forward, forward_peak = live.now_bytes, live.flops, live.peak_all_bytes
            if total.requires_grad:
                total.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return Traced(
        activations_bytes=live.peak_bytes,
        peak_bytes=live.peak_all_bytes,
        saved_bytes=saved,
        forward_flops=forward,
        backward_flops=live.flops - forward,
        traffic_bytes=live.traffic_bytes,
        operations=live.operations,
        tokens=tokens,
        forward_peak_bytes=forward_peak,
        finished_bytes=live.released_at_peak_bytes,
        curved=live.curved,
        drawn=live.drawn,
        expanded=live.expanded,
        line=_thinned(live.line),
    )


def sample_batch(
    lengths: Sequence[int],
    supervised_share: float = 1.0,
    predicts: ProblemKind | None = None,
    answers: tuple[int, ...] = (),
) -> Batch:
    """A batch of documents of these lengths whose last tokens are supervised; ids and labels are all 0."""
    ids, sources, start = sum(lengths), [], 0
    learnts = [min(length - 1, max(1, round(supervised_share * length))) for length in lengths]
    for length, learnt in zip(lengths, learnts, strict=True):
        sources.append(torch.arange(start + length - 1 - learnt, start + length - 1))
        start += length
    source = torch.cat(sources)
    return Batch(
        ids=torch.zeros(ids, dtype=torch.int64),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        sources=source,
        targets=torch.zeros_like(source),
        rows=tuple(f"document {index}" for index in range(len(lengths))),
        labels=_sample_labels(predicts, len(source) if predicts == "tokens" else len(lengths)),
        prompts=tuple(length - learnt for length, learnt in zip(lengths, learnts, strict=True)),
        answers=answers,
        ranks=torch.tensor([rank for count in answers for rank in range(count)]) if answers else None,
    )


def _sample_labels(predicts: ProblemKind | None, count: int) -> Tensor | None:
    if predicts in (None, "reward"):
        return None
    return torch.zeros(count, dtype=torch.float32 if predicts == "regression" else torch.int64)


@contextmanager
def _as_if_on_cpu(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    # on meta itself attention would take its unfused path and seem to hold every score
    made: dict[int, Tensor] = {}
    old: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]  # type: ignore[list-item]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    old.append((table, name, tensor))
                    table[name] = made.setdefault(id(tensor), _fake(tensor, mode))
    try:
        yield
    finally:
        for table, name, tensor in old:
            table[name] = tensor


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if isinstance(tensor, Quantized):
        return nn.Parameter(tensor.with_parts(partial(_fake, mode=mode)), requires_grad=False)
    bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    pretended = FakeTensor(mode, bare, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(pretended, requires_grad=tensor.requires_grad)
    return pretended


def _thinned(line: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    step = -(-len(line) // _POINTS) or 1
    return tuple(max(line[start : start + step], key=sum) for start in range(0, len(line), step))


def _release(live: LiveStorages, gradient: Tensor | None, item_bytes: int) -> None:
    if gradient is not None:
        live.release(gradient, item_bytes)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    # torch's own table lacks the CPU's fused attention
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return 0
