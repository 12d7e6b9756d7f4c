"""How low the rank of a learnt change of weights really was: singular values of every changed matrix.

The one idea: whatever the method, what it did to a matrix is tuned minus base, so that LoRA and full tuning can be laid
side by side. Methods that change no matrix (prompts, adapters beside a map) have no spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.adapt.adapter import Adapter

ENERGY = 0.9
POINTS = 64


@dataclass(frozen=True)
class Spectrum:
    """The learnt changes of one model.

    Attributes:
        matrices: how many have changed.
        median_rank, largest_rank: singular values that hold 90 % of the energy (the sum of their squares), over them.
        full_rank: the smaller side of the matrix with the median.
        shares: share of the energy within the first 1, 2, ... singular values, mean over the matrices.
    """

    matrices: int
    median_rank: int
    largest_rank: int
    full_rank: int
    shares: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spectrum(changes: Iterator[Tensor] | Sequence[Tensor]) -> Spectrum | None:
    """The spectrum of changes, each [outputs, inputs]; None where nothing has changed."""
    import torch

    ranks, sides, shares = [], [], []
    for change in changes:
        values = singular_values(change)
        if not float(values.sum()):
            continue
        ranks.append(effective_rank(values))
        sides.append(len(values))
        held = energy_shares(values)
        shares.append(torch.cat([held, held.new_ones(POINTS)])[:POINTS])
    if not ranks:
        return None
    middle = sorted(range(len(ranks)), key=ranks.__getitem__)[len(ranks) // 2]
    mean = torch.stack(shares).mean(0)[: max(sides)]
    return Spectrum(len(ranks), ranks[middle], max(ranks), sides[middle], tuple(round(x, 5) for x in mean.tolist()))


def singular_values(change: Tensor) -> Tensor:
    """All of them, float64, descending. Through the smaller Gram matrix: exact where the energy is, and fast."""
    import torch

    wide = change.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).sqrt()


def energy_shares(values: Tensor) -> Tensor:
    """Share of the sum of squares within the first 1, 2, ... singular values."""
    energy = values.square()
    return energy.cumsum(0) / energy.sum()


def effective_rank(values: Tensor, share: float = ENERGY) -> int:
    """The fewest singular values that hold a share of the energy."""
    # a rounding error of the sum is no reason for one more
    return int((energy_shares(values) < share - 1e-9).sum()) + 1


def changes_of_adapter(adapter: Adapter) -> Iterator[Tensor]:
    """Every change of a matrix that an adapter makes: its inserts' and its copies'."""
    for _, _, insert in adapter.inserts():
        change = insert.method.weight(insert)
        if change is not None and change.dim() == 2:
            yield change
    for path, value in adapter.trained.items():
        base = adapter.replaced.get(path)
        if base is not None and value.dim() == 2:
            yield value.detach().float() - base.detach().float()


def changes_of_model(tuned: nn.Module, base: nn.Module) -> Iterator[Tensor]:
    """Every changed matrix of a model that was trained itself."""
    before = dict(base.named_parameters())
    for name, value in tuned.named_parameters():
        if value.dim() == 2 and name in before and before[name].shape == value.shape:
            yield value.detach().float() - before[name].detach().float()
