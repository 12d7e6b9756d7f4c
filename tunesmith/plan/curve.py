"""How the loss on held-out rows falls with the amount of data: L = E + A / D^a, and how sure that is.

The one idea: for each exponent a and floor E the amplitude follows by least squares, so that two numbers are searched;
an interval holds what any triple gives that fits the runs not much worse than the best (profile likelihood). Needs no
torch. The form is that of Hoffmann et al. (2022, arXiv 2203.15556, equation 2) for a model of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import ConfigError

Floats = NDArray[np.float64]
LEAST, MOST = 0.02, 4.0  # exponents that are looked at
# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond, the last one is wide enough
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_GRID, _ROUNDS, _SHRINK = 41, 60, 0.6
_FULL = 0.1  # of a box, what the likely region takes of it when it is seen well enough


@dataclass(frozen=True)
class Estimate:
    """A number and between which two it lies, 95 of 100 times."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A curve through runs.

    Attributes:
        tokens: float64 [runs], read by each.
        losses: float64 [runs], nats a token on held-out rows.
        floor, amplitude, exponent: E, A (of D in tokens) and a.
        noise: deviation of a loss from the curve; between runs of the same amount it is the same one.
    """

    tokens: Floats
    losses: Floats
    floor: float
    amplitude: float
    exponent: float
    noise: float

    def at(self, tokens: float) -> Estimate:
        """The loss expected after so many tokens."""
        return self.estimate(lambda floor, amplitude, exponent: floor + amplitude * tokens**-exponent)

    def gain(self, tokens: float, times: float = 2.0) -> Estimate:
        """By how much the loss falls from so many tokens to as many times more."""
        return self.estimate(lambda floor, amplitude, exponent: amplitude * tokens**-exponent * (1 - times**-exponent))

    def estimate(self, of: Callable[[Any, Any, Any], Any]) -> Estimate:
        """A function of E, A and a, with the least and the most it is within the region of likely ones."""
        found = of(*self._likely)
        best = float(of(self.floor, self.amplitude, self.exponent))
        return Estimate(best, min(best, float(found.min())), max(best, float(found.max())))

    @property
    def spare_t(self) -> float:
        """Student's t for what the runs leave free."""
        return _T[min(len(self.tokens) - 3, len(_T)) - 1]

    @cached_property
    def _likely(self) -> tuple[Floats, Floats, Floats]:
        """E, A and a on the border of the likely region, each float64 [points]."""
        most = (len(self.tokens) - 3) * self.noise**2 + (self.spare_t * self.noise) ** 2
        found = [np.array([one]) for one in (self.floor, self.amplitude, self.exponent)]
        box, top = (LEAST, MOST, 0.0, float(self.losses.min())), float(self.losses.min())
        for _ in range(_ROUNDS):
            exponents, floors, amplitudes, wrong, curvature = _surface(self.tokens, self.losses, box)
            inside = wrong <= most
            if not inside.any():  # it lies between the points of the grid
                box = self._nearer(box)
                continue
            a, e = exponents[inside], floors[inside]
            # at each point the amplitude may still move as far as the rest of the room allows
            reach = np.sqrt((most - wrong[inside]) / curvature[inside])
            sides = [np.maximum(0.0, amplitudes[inside] + sign * reach) for sign in (-1, 0, 1)]
            found = [np.tile(e, 3), np.concatenate(sides) * self.tokens.max() ** np.tile(a, 3), np.tile(a, 3)]
            if inside.mean() > _FULL:
                break
            # closer to it, with a point to spare at each side
            step, width = (box[1] / box[0]) ** (2 / _GRID), 2 * (box[3] - box[2]) / _GRID
            least, highest = max(0.0, e.min() - width), min(top, e.max() + width)
            closer = (max(LEAST, a.min() / step), min(MOST, a.max() * step), least, highest)
            if closer == box:
                break
            box = closer
        return found[0], found[1], found[2]

    def _nearer(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Half as large, around the best."""
        ratio, width = (box[1] / box[0]) ** 0.25, (box[3] - box[2]) / 4
        floors = max(0.0, self.floor - width), min(float(self.losses.min()), self.floor + width)
        return max(LEAST, self.exponent / ratio), min(MOST, self.exponent * ratio), *floors

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        floor = asdict(self.estimate(lambda floor, amplitude, exponent: floor + 0 * exponent))
        amplitude = asdict(self.estimate(lambda floor, amplitude, exponent: amplitude + 0 * exponent))
        exponent = asdict(self.estimate(lambda floor, amplitude, exponent: exponent))
        return {"floor": floor, "amplitude": amplitude, "exponent": exponent, "noise": self.noise}


def fit_curve(tokens: Sequence[float], losses: Sequence[float]) -> Curve:
    """The curve nearest to some runs, in float64, with E >= 0 and A >= 0. Raises ConfigError for too few of them."""
    x, y = np.asarray(tokens, np.float64), np.asarray(losses, np.float64)
    if len(x) < 4 or len(set(x.tolist())) < 3:
        raise ConfigError(f"a curve needs four runs of three amounts; there are {len(x)}", where="plan --curve")
    low, high, least, most = LEAST, MOST, 0.0, float(y.min())
    best = (0.0, 0.0, 0.0, np.inf)
    for _ in range(_ROUNDS):
        exponents, floors, amplitudes, wrong, _ = _surface(x, y, (low, high, least, most))
        place = np.unravel_index(int(wrong.argmin()), wrong.shape)
        if wrong[place] < best[3]:
            best = (floors[place], amplitudes[place], exponents[place], wrong[place])
        ratio, width = (high / low) ** (_SHRINK / 2), (most - least) * _SHRINK / 2
        low, high = max(LEAST, best[2] / ratio), min(MOST, best[2] * ratio)
        least, most = max(0.0, best[0] - width), min(float(y.min()), best[0] + width)
    floor, amplitude, exponent, left = map(float, best)
    noise = (left / (len(x) - 3)) ** 0.5
    return Curve(x, y, floor, amplitude * float(x.max()) ** exponent, exponent, noise)


def _surface(
    tokens: Floats, losses: Floats, box: tuple[float, float, float, float]
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Over a grid of exponents and floors, each [grid, grid]: these, the amplitude by least squares for tokens counted
    in the largest number of them, the sum of squares left, and how fast that rises with the amplitude squared."""
    low, high, least, most = box
    exponents, floors = np.meshgrid(np.geomspace(low, high, _GRID), np.linspace(least, most, _GRID), indexing="ij")
    powers = (tokens / tokens.max()) ** -exponents[..., None]  # grid grid runs
    above = losses - floors[..., None]
    curvature = (powers**2).sum(-1)
    amplitudes = np.maximum(0.0, (powers * above).sum(-1) / curvature)
    wrong = ((above - amplitudes[..., None] * powers) ** 2).sum(-1)
    return exponents, floors, amplitudes, wrong, curvature
