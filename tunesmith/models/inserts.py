"""Inserts: the parameters that an adapter has at one place, and what they add there.

The one idea: an insert knows its numbers and its output features, its method says what it makes of an input. Where it
acts, and when, is the business of the port that holds it (`ports.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from tunesmith.kernels.lowrank import LowRank
from tunesmith.models.copies import base_parameter, run_base

if TYPE_CHECKING:
    from tunesmith.models.ports import Port
    from tunesmith.models.targets import Rows


class Acts(Protocol):
    """What a port and merging need of a method."""

    @property
    def kind(self) -> str: ...

    def delta(self, insert: Insert, x: Tensor, y: Tensor) -> Tensor:
        """What the insert adds to the output features of its role; `x` is the input and `y` the output so far."""
        ...

    def weight(self, insert: Insert) -> Tensor | None:
        """The same as a change of weights; None where it is none."""
        ...

    def fold(self, insert: Insert, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What merging adds to weight and bias of the role as they are so far; both None where it is no such change."""
        ...

    def low_rank(self, insert: Insert) -> LowRank | None:
        """The delta as s B A x with factors of now; None where it is something else, or dropout acts."""
        ...


class Insert(nn.Module):
    """The parameters of one adapter for one role at one port.

    Attributes:
        method: answers `delta`; not a module, never saved.
        rows: the output features it adds to; None for all of them.
        scale: factor of the delta.
        port: where it acts, from the moment it is put there; for methods that need the base at hand.
    """

    port: Port

    def __init__(self, method: Acts, parameters: dict[str, nn.Parameter], rows: Rows | None, scale: float) -> None:
        super().__init__()
        self.method, self.rows, self.scale = method, rows, scale
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains here, by name; a tensor that several inserts share is one insert's alone."""
        return dict(self.named_parameters())

    def low_rank(self) -> LowRank | None:
        """The delta as s B A x, of all output features of the port; None where it is something else."""
        found = self.method.low_rank(self)
        if found is None or self.rows is None:
            return found
        return LowRank(found.a, spread(found.b.T, self.rows).T, found.scale)

    def mapped(self, x: Tensor) -> Tensor:
        """What the base map itself makes of x, without its bias: [..., output features of the role].

        W (x * l) for a method that scales what goes in: its delta is `insert.mapped(x * (l - 1))`.
        """
        out = run_base(self.port.base, x)
        bias = base_parameter(self.port.base, "bias")
        out = out if bias is None else out - bias
        return out if self.rows is None else gathered(out, self.rows)

    def rerun(self, x: Tensor, **changes: Tensor) -> Tensor:
        """What the base module makes of x with `changes` added to its parameters, by name (`weight`, `bias`).

        The parameters themselves stay as they are; a change may have another dtype than its parameter. This is how
        a norm's gain is changed without dividing by the old one, whatever form the family gives it.
        """
        base = self.port.base
        own = {name: base_parameter(base, name) for name in changes}
        return run_base(base, x, **{name: value + changes[name] for name, value in own.items() if value is not None})

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output with this insert's delta in it."""
        delta = self.method.delta(self, x, y)
        if factor is not None:
            delta = delta * factor.to(delta.dtype)
        if self.rows is not None:
            delta = spread(delta, self.rows)
        return y + delta


class SoftTokens(Insert):
    """Trained vectors that stand where no token is; at the port of the embedding that documents go through.

    Nothing is added to any token. Documents get room for the vectors in `soft.py`; here they are written into it, as
    they are: what an embedding does to its own rows (gemma's factor) is not done to them, as in peft.

    Attributes:
        before, inside: how many stand before a document, and how many in it, where its first answer begins. The
            parameter `vectors` [before + inside, width] holds them in this order.
    """

    def __init__(self, method: Acts, vectors: nn.Parameter, before: int, inside: int = 0) -> None:
        super().__init__(method, {"vectors": vectors}, None, 1.0)
        self.before, self.inside = before, inside

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output as it is."""
        return y


class Keys(Insert):
    """Trained keys or values that stand before those of a document; at the port of the map that makes the others.

    Nothing is added to any token. `attention.py` finds them through `prefixes.py` and asks the method for them.

    Attributes:
        length: how many.
    """

    def __init__(self, method: Acts, parameters: dict[str, nn.Parameter], length: int) -> None:
        super().__init__(method, parameters, None, 1.0)
        self.length = length

    def added(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The output as it is."""
        return y

    def states(self) -> Tensor:
        """The keys or values: [length, output features of the role]."""
        return self["vectors"]


def spread(values: Tensor, rows: Rows) -> Tensor:
    """Puts [..., rows.count] at its output features and zeros elsewhere: [..., groups x period]."""
    grouped = values.unflatten(-1, (rows.groups, rows.stop - rows.start))
    return nn.functional.pad(grouped, (rows.start, rows.period - rows.stop)).flatten(-2)


def gathered(values: Tensor, rows: Rows) -> Tensor:
    """The inverse of `spread`: [..., groups x period] to [..., rows.count]."""
    return values.unflatten(-1, (rows.groups, rows.period))[..., rows.start : rows.stop].flatten(-2)
