"""Agreement, strengths and shares equal their papers' formulas, or a reference that is not ours."""

from __future__ import annotations

import math
import random
from itertools import combinations

import krippendorff
import numpy as np
import pytest
import torch

from tunesmith.core.judged import Judged
from tunesmith.evaluate.agreement import (
    Cohen,
    Fleiss,
    Krippendorff,
    between_groups,
    between_people,
    ratings,
    tie_discounted,
    with_the_others,
)
from tunesmith.evaluate.comparisons import biases, outcomes_of, statistics
from tunesmith.evaluate.shares import share, wilson
from tunesmith.evaluate.strengths import davidson


def drawn(seed: int, units: int, people: int, missing: float = 0.0) -> list[list[int | None]]:
    """Labels [units][people] that agree more than chance; some are missing."""
    draw = random.Random(seed)
    found: list[list[int | None]] = []
    for _ in range(units):
        truth = draw.choice((-1, 0, 1, 1))
        row: list[int | None] = [truth if draw.random() < 0.7 else draw.choice((-1, 0, 1)) for _ in range(people)]
        found.append([None if draw.random() < missing else label for label in row])
    return found


def labels(table: list[list[int | None]]) -> list[tuple[int, list[int]]]:
    return [(place, [one for one in row if one is not None]) for place, row in enumerate(table)]


def test_cohens_kappa_is_its_formula() -> None:
    """Kills: expected agreement from pooled shares (that is Scott's pi), rows and columns confused."""
    table = drawn(0, 80, 2)
    one, other = (np.array([row[place] for row in table]) for place in (0, 1))
    expected = sum(float((one == label).mean()) * float((other == label).mean()) for label in (-1, 0, 1))
    kappa = (float((one == other).mean()) - expected) / (1 - expected)
    found = Cohen("").measure(labels(table))
    assert found is not None
    assert found.value == pytest.approx(kappa, abs=1e-12)
    assert found.low < kappa < found.high


def test_fleiss_kappa_is_its_formula() -> None:
    """Fleiss 1971: P_i = (sum n_ij^2 - n) / (n (n - 1)), p_j = shares of all labels. Kills: n^2 for n (n - 1)."""
    table = drawn(1, 60, 5)
    counts = np.array([[row.count(label) for label in (-1, 0, 1)] for row in table], dtype=np.float64)
    agreed = ((counts**2).sum(1) - 5) / (5 * 4)
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    found = Fleiss("").measure(labels(table))
    assert found is not None
    assert found.value == pytest.approx((agreed.mean() - expected) / (1 - expected), abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_krippendorffs_alpha_is_that_of_the_krippendorff_package(level: str) -> None:
    """With labels missing. Kills: units with one label counted, n^2 for n (n - 1), ordinal distance without halves."""
    table = drawn(2, 70, 4, missing=0.4)
    data = [[np.nan if row[place] is None else row[place] for row in table] for place in range(4)]
    reference = krippendorff.alpha(reliability_data=data, level_of_measurement=level)
    found = Krippendorff("", ordinal=level == "ordinal").measure(labels(table))
    assert found is not None
    assert found.value == pytest.approx(reference, abs=1e-12)


def test_tie_discounted_accuracy_gives_half_a_point_for_one_tie() -> None:
    """LIMA, section 4.2. Kills: half a point for two ties, or a whole one for one tie."""
    assert [tie_discounted(*both) for both in ((1, 1), (0, 0), (1, 0), (0, -1), (1, -1))] == [1, 1, 0.5, 0.5, 0]


def judged(prompt: int, who: str, group: str, ranks: dict[str, int], kind: str = "ranked") -> Judged:
    return Judged(prompt, who, group, kind, tuple(ranks), tuple(ranks.values()), tuple(f"{one}!" for one in ranks))  # type: ignore[arg-type]


def test_agreement_within_and_between_groups_compares_no_one_with_themselves() -> None:
    """Kills: an annotator paired with themselves, a group pair counted in one order only, order shown mistaken."""
    said = [
        judged(1, "ann", "crowd", {"A": 1, "B": 2}),
        judged(1, "bob", "crowd", {"B": 2, "A": 1}),  # the same, shown the other way round
        judged(1, "eve", "author", {"A": 1, "B": 1}),
        judged(2, "ann", "crowd", {"A": 2, "B": 1}),
        judged(2, "eve", "author", {"A": 1, "B": 2}),
        judged(2, "bob", "crowd", {}, "skip"),
    ]
    found = ratings(said)
    groups = between_groups(found, {"ann": "crowd", "bob": "crowd", "eve": "author"})
    assert {both: value.value for both, value in groups.items() if value} == {
        ("crowd", "crowd"): 1.0,
        ("author", "crowd"): pytest.approx((0.5 + 0.5 + 0.0) / 3),
    }
    alone = with_the_others(found, "eve")
    assert alone is not None
    assert alone.value == pytest.approx(1 / 3)
    assert set(between_people(found)) == {("ann", "bob"), ("ann", "eve"), ("bob", "eve")}


# strengths


def test_two_systems_have_the_strengths_that_reproduce_their_shares() -> None:
    """Davidson's model is saturated there: log p_A - log p_B = ln(w / l), v = t / sqrt(w l). Kills: ties dropped."""
    wins, ties, losses = 30, 20, 10
    results = [1] * wins + [0] * ties + [-1] * losses
    found = davidson([(place, "A", "B", result) for place, result in enumerate(results)])
    assert found is not None
    assert found.log_strength[0] - found.log_strength[1] == pytest.approx(math.log(wins / losses), abs=1e-8)
    assert found.ties == pytest.approx(ties / math.sqrt(wins * losses), abs=1e-8)
    elo = found.elo()
    assert elo["A"][0] - elo["B"][0] == pytest.approx(400 * math.log10(wins / losses), abs=1e-6)


def test_strengths_are_those_of_a_search_for_the_likeliest() -> None:
    """Davidson 1970, eq. 2, written out and climbed by L-BFGS. Kills: a wrong gradient or a wrong feature of ties."""
    draw = random.Random(3)
    strong = dict(zip("ABCD", (0.9, 0.1, -0.3, -0.7), strict=True))
    outcomes = []
    for prompt in range(120):
        for one, other in combinations("ABCD", 2):
            p, q = math.exp(strong[one]), math.exp(strong[other])
            weights = (p, 0.6 * math.sqrt(p * q), q)
            outcomes.append((prompt, one, other, draw.choices((1, 0, -1), weights)[0]))
    found = davidson(outcomes)
    assert found is not None

    free = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    climber = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        climber.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for _, one, other, result in outcomes:
            p, q = free["ABCD".index(one)].exp(), free["ABCD".index(other)].exp()
            tie = free[4].exp() * (p * q).sqrt()
            total = total - torch.log({1: p, 0: tie, -1: q}[result] / (p + q + tie))
        (total / len(outcomes)).backward()
        return total / len(outcomes)

    climber.step(loss)
    centred = (free[:4] - free[:4].mean()).detach().numpy()
    assert found.log_strength == pytest.approx(centred, abs=1e-5)
    assert found.ties == pytest.approx(math.exp(free[4].item()), abs=1e-5)


@pytest.mark.parametrize("pairs", [60, 700, 20_000])
def test_strengths_are_found_however_many_pairs_there_are(pairs: int) -> None:
    """Kills: steps along the direction that changes nothing: rounding makes them, and more pairs make them longer."""
    draw = random.Random(pairs)
    strong = {"base": 0.0, "larger": 1.5, "tuned": 1.1}
    outcomes = []
    for prompt in range(pairs):
        one, other = draw.sample(sorted(strong), 2)
        p, q = math.exp(strong[one]), math.exp(strong[other])
        outcomes.append((prompt, one, other, draw.choices((1, 0, -1), (p, 0.5 * math.sqrt(p * q), q))[0]))
    found = davidson(outcomes)
    assert found is not None
    assert abs(found.log_strength.sum()) < 1e-9
    gap = found.log_strength[1] - found.log_strength[0]
    assert gap == pytest.approx(1.5, abs=12 / math.sqrt(pairs))


def test_no_strengths_are_told_where_none_are_the_likeliest() -> None:
    """Kills: a number that only says where the search stopped."""
    always = [(place, "A", "B", 1) for place in range(9)]
    assert davidson(always) is None
    assert davidson([*always, (10, "A", "B", 0)]) is None
    assert davidson([(place, "A", "B", 0) for place in range(9)]) is None
    assert davidson([*always, (10, "A", "B", -1)]) is not None
    apart = [(place, *two, result) for place in range(9) for two in (("A", "B"), ("C", "D")) for result in (1, 0, -1)]
    assert davidson(apart) is None  # type: ignore[arg-type]


# shares and biases


def test_intervals_of_shares_are_wilsons_where_prompts_have_one_pair() -> None:
    """And no narrower where a prompt is judged again by everyone. Kills: pairs taken for evidence."""
    points = [(place, float(place < 30)) for place in range(40)]
    found = share(points)
    assert found is not None
    p, z = 0.75, 1.959963984540054
    n = 39.0  # the variance of a sample has n - 1
    root = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx(
        ((p + z * z / (2 * n) - root) / (1 + z * z / n), (p + z * z / (2 * n) + root) / (1 + z * z / n)), abs=1e-9
    )
    again = share(points * 5)
    assert again is not None
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=1e-9)
    sure = share([(place, 1.0) for place in range(12)])
    assert sure is not None
    assert (sure.low, sure.high) == pytest.approx(wilson(1.0, 12))
    assert sure.low < 0.8


def test_biases_see_who_prefers_the_first_or_the_longer() -> None:
    """Kills: the side mistaken, ties counted, imported orders believed."""

    def one(prompt: int, first: str, second: str, ranks: tuple[int, int], group: str = "crowd") -> Judged:
        return Judged(prompt, "ann", group, "ranked", ("A", "B"), ranks, (first, second))

    said = [one(1, "long one", "x", (1, 2)), one(2, "y", "longer", (1, 2)), one(3, "aa", "b", (2, 1))]
    said += [one(4, "aa", "b", (1, 1)), one(5, "aa", "b", (2, 1), "imported")]
    found = biases(outcomes_of(said))
    assert found["first_shown"]["value"] == pytest.approx(2 / 3)
    assert found["longer"]["value"] == pytest.approx(1 / 4)


def test_all_bad_is_a_tie_and_a_skip_is_nothing() -> None:
    """Kills: skipped prompts counted as ties; a sample of a system compared with its own other sample."""
    said = [
        judged(1, "ann", "crowd", {"A": 1, "B": 1}, "bad"),
        judged(2, "ann", "crowd", {}, "skip"),
        judged(3, "ann", "crowd", {"A": 1, "B": 2}),
        Judged(4, "ann", "crowd", "ranked", ("A", "A", "B"), (1, 2, 2), ("one", "two", "three")),
    ]
    found = statistics(said)
    [row] = found["versus"]
    assert row["n"] == 4
    assert (row["win"]["value"], row["tie"]["value"], row["loss"]["value"]) == (0.5, 0.5, 0.0)
    assert found["judgements"] == {"all": 4, "ranked": 2, "bad": 1, "skip": 1, "prompts": 3, "annotators": 1}
