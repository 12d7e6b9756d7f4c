"""Strengths of systems from pairs with ties: Bradley and Terry's model with Davidson's parameter for ties.

P(i beats j) = p_i / d, P(j beats i) = p_j / d, P(tie) = v sqrt(p_i p_j) / d, where d is the sum of the three numerators
(Davidson 1970, JASA 65, eq. 2). log p and log v enter linearly, so there is one maximum, found by Newton's steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ELO_PER_NAT = 400 / math.log(10)  # ten times as strong is 400 points
ELO_MEAN = 1000.0
_FARTHEST = 12.0  # log strengths beyond it mean that there is no maximum


@dataclass(frozen=True)
class Strengths:
    """The fit.

    Attributes:
        systems: in the order of the arrays.
        log_strength: natural logarithms, with mean 0.
        covariance: of these, robust to what outcomes of one prompt have in common.
        ties: v; 0 where there was no tie.
    """

    systems: tuple[str, ...]
    log_strength: Floats
    covariance: Floats
    ties: float

    def elo(self, z: float = 1.959964) -> dict[str, tuple[float, float, float]]:
        """System -> points on Elo's scale and the ends of their interval, with mean 1000."""
        found = {}
        for place, name in enumerate(self.systems):
            middle = ELO_MEAN + ELO_PER_NAT * float(self.log_strength[place])
            half = z * ELO_PER_NAT * math.sqrt(max(0.0, float(self.covariance[place, place])))
            found[name] = (middle, middle - half, middle + half)
        return found


def davidson(outcomes: Sequence[tuple[int, str, str, int]]) -> Strengths | None:
    """Strengths from (prompt, system, other system, 1 | 0 | -1 for win, tie, loss of the first).

    None where no finite strengths are the likeliest: some system won, or lost, everything against some others, or
    nothing but ties happened.
    """
    import numpy as np

    systems = tuple(sorted({name for _, *two, _ in outcomes for name in two}))
    if len(systems) < 2 or all(result == 0 for *_, result in outcomes):
        return None
    design, chosen = _design(outcomes, systems)
    if all(result != 0 for *_, result in outcomes):
        design, chosen = np.delete(design[:, [0, 2]], -1, axis=2), chosen // 2
    fitted = _newton(design, chosen, len(systems))
    if fitted is None or np.abs(fitted[0][: len(systems)]).max() > _FARTHEST:
        return None
    parameters, gradients, information = fitted
    prompts = np.array([prompt for prompt, *_ in outcomes])
    inverse = np.linalg.inv(information)
    each = np.stack([gradients[prompts == prompt].sum(0) for prompt in np.unique(prompts)])
    count = len(systems)
    covariance = (inverse @ (each.T @ each) @ inverse)[:count, :count]
    centre = np.eye(count) - 1 / count
    ties = float(np.exp(parameters[count])) if len(parameters) > count else 0.0
    return Strengths(systems, centre @ parameters[:count], centre @ covariance @ centre, ties)


def _design(outcomes: Sequence[tuple[int, str, str, int]], systems: tuple[str, ...]) -> tuple[Floats, Floats]:
    """Features [outcomes, 3, systems + 1] of win, tie and loss, and which of them happened, int [outcomes]."""
    import numpy as np

    design = np.zeros((len(outcomes), 3, len(systems) + 1))
    place = {name: number for number, name in enumerate(systems)}
    for row, (_, one, other, _) in enumerate(outcomes):
        design[row, 0, place[one]] = design[row, 2, place[other]] = 1.0
        design[row, 1, [place[one], place[other]]] = 0.5
        design[row, 1, -1] = 1.0
    return design, np.array([1 - result for *_, result in outcomes])


def _newton(design: Floats, chosen: Floats, systems: int) -> tuple[Floats, Floats, Floats] | None:
    """Parameters [k], gradients [outcomes, k] and information [k, k] at the maximum; None where it is not reached."""
    import numpy as np

    parameters = np.zeros(design.shape[2])
    happened = design[np.arange(len(design)), chosen]
    shift = np.zeros(len(parameters))
    shift[:systems] = 1.0
    all_alike = np.outer(shift, shift)
    for _ in range(60):
        logits = design @ parameters
        chance = np.exp(logits - logits.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        expected = (chance[:, :, None] * design).sum(1)
        gradients = happened - expected
        information = np.einsum("no,nok,nol->kl", chance, design, design) - expected.T @ expected
        information += all_alike  # all stronger alike changes nothing: of all maxima the one with mean 0
        if np.linalg.matrix_rank(information, hermitian=True) < len(parameters):
            return None  # some systems have never met the others, not even over third ones
        step = np.linalg.solve(information, gradients.sum(0))
        if np.abs(step).max() < 1e-9:
            return parameters, gradients, information
        parameters += step * min(1.0, 2.0 / np.abs(step).max())  # not farther than seven times as strong at once
        if np.abs(parameters).max() > 2 * _FARTHEST:
            return None
    return None
