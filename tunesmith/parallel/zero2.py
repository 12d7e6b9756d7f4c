"""ZeRO stage 2: gradients are split as well. A bucket is reduced and freed as soon as a backward pass has filled it.

So no process ever holds more of the gradient than its part and the buckets that are being filled (Rajbhandari et al.
2020, arXiv 1910.02054, section 5.2). The price is one reduction a micro-batch instead of one a step: with k of them,
k psi + psi are sent.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from tunesmith.parallel.ddp import Split
from tunesmith.parallel.layout import Held
from tunesmith.parallel.world import World


class Zero2(Split):
    """Optimizer state and gradients in parts."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._filled: dict[int, Tensor] = {}
        self._wanted: dict[int, set[str]] = {}
        self._parts: dict[int, Tensor] = {}
        self._reached: set[str] = set()
        self._due: dict[int, list[int]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def hold(self, held: Held) -> dict[str, nn.Parameter]:
        pieces = super().hold(held)
        self._parameters = held.parameters
        self._at = {name: number for number, bucket in enumerate(self.buckets) for name in bucket.spans}
        for turn in {self._turn(number) for number in range(len(self.buckets))}:
            self._begin(turn)
        for name, parameter in held.parameters.items():
            # after the precision's own hook: then the gradient is the master's
            hook = parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))
            self._hooks.append(hook)
        return pieces

    def passed(self, turn: int | None = None) -> None:
        for ended in sorted(self._due):
            if turn in (None, ended):
                for number in self._due[ended]:
                    self._send(number)
                self._begin(ended)

    def reduce(self, names: Collection[str]) -> set[str]:
        ordered = sorted(names)
        reached = self.world.sums([float(name in self._reached) for name in ordered])
        for number, part in self._parts.items():
            self.give(self.buckets[number], part, names)
        self._parts, self._reached = {}, set()
        return {name for name, count in zip(ordered, reached, strict=True) if not count}

    def gradients(self) -> list[Tensor]:
        return [*super().gradients(), *self._parts.values(), *self._filled.values()]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _turn(self, number: int) -> int:
        return self.turns.get(next(iter(self.buckets[number].spans)), 0)

    def _begin(self, turn: int) -> None:
        self._due[turn] = [number for number in range(len(self.buckets)) if self._turn(number) == turn]
        self._wanted |= {number: set(self.buckets[number].spans) for number in self._due[turn]}

    def _arrived(self, name: str, parameter: nn.Parameter) -> None:
        master, number = self.masters[name], self._at[name]
        if master.grad is None:
            return
        bucket = self.buckets[number]
        if number not in self._filled:
            self._filled[number] = bucket.zeros(master.grad.dtype, master.grad.device)
        bucket.put(self._filled[number], name, master.grad)
        master.grad = None
        self._reached.add(name)
        self._wanted[number].discard(name)
        # strictly one after the other: all processes must send the same bucket at the same time
        due = self._due[self._turn(number)]
        while due and due[0] in self._filled and not self._wanted[due[0]]:
            self._send(due.pop(0))

    def _send(self, number: int) -> None:
        bucket = self.buckets[number]
        if not any(self._parameters[name].requires_grad for name in bucket.spans):
            return  # of another phase
        first = self.masters[next(iter(bucket.spans))]
        flat = self._filled.pop(number, None)
        if flat is None:
            flat = bucket.zeros(first.dtype, first.device)
        part = self.scattered(flat, bucket)
        with torch.no_grad():
            self._parts[number] = self._parts[number].add_(part) if number in self._parts else part
