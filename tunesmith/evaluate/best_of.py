"""The best of several samples: what it earns on average, and how far it is from the model that drew them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_best(rewards: Sequence[float], count: int) -> float:
    """What the best of `count` samples earns on average, from the rewards of n >= count samples of one prompt.

    The mean over all subsets of that size, which is unbiased: the i-th smallest is the best of C(i - 1, count - 1) of
    them (as pass@k of Chen et al. 2021, arXiv 2107.03374, for rewards of any size).
    """
    ordered, all_ = sorted(rewards), math.comb(len(rewards), count)
    return sum(math.comb(place, count - 1) / all_ * reward for place, reward in enumerate(ordered))


def divergence_bound(count: int) -> float:
    """Nats that the best of `count` is away from the model at most: log n - (n - 1) / n.

    KL(best-of-n || model) of a whole answer (Stiennon et al. 2020, arXiv 2009.01325; that it is a bound, which ties
    lower, is of Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(count) - (count - 1) / count
