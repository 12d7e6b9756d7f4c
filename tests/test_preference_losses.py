"""Losses of compared answers: against the papers' formulas in float64, by hand, and what must hold at the start."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from tiny_models import TinyLoaded, bits, disturb, tiny_batch, tiny_loaded, with_exact_norms
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.errors import DataError
from tunesmith.core.problem import Problem
from tunesmith.core.types import Batch
from tunesmith.models.policy import Policy
from tunesmith.objectives.dpo import DPO
from tunesmith.objectives.ranking import ranking_losses
from tunesmith.objectives.reward import Reward


def compared(answers: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0) -> Batch:
    """A batch of rows of so many answers; documents of uneven lengths."""
    lengths = tuple(5 + (3 * place) % 7 for place in range(sum(answers)))
    return replace(tiny_batch(lengths, seed), answers=answers, ranks=torch.tensor(ranks))


PAIRS = compared((2, 2, 2), (0, 1) * 3)


def scores(count: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=draw, dtype=torch.float64)


def test_two_answers_are_bradley_terry_with_margin_and_smoothing() -> None:
    """Kills: a margin on the wrong side; a smoothing that is not symmetric; rows that see each other's answers."""
    s = scores(6).requires_grad_()
    gap = s[::2] - s[1::2]
    torch.testing.assert_close(ranking_losses(s, PAIRS), -logsigmoid(gap), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ranking_losses(s, PAIRS, margin=0.7), -logsigmoid(gap - 0.7), rtol=1e-12, atol=1e-12)
    smooth = -0.9 * logsigmoid(gap) - 0.1 * logsigmoid(-gap)
    torch.testing.assert_close(ranking_losses(s, PAIRS, label_smoothing=0.1), smooth, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: ranking_losses(x, PAIRS, 0.3, 0.2), s)


def test_rankings_are_plackett_luce() -> None:
    """Against products of choices, one after another; the chances of all orders are one. Kills: a better answer
    among the rivals."""
    s, total = scores(4), 0.0
    for order in permutations(range(4)):
        ranks = tuple(order.index(place) for place in range(4))
        loss = ranking_losses(s, compared((4,), ranks))[0]
        chances = [s[place].exp() / sum(s[other].exp() for other in order[at:]) for at, place in enumerate(order)]
        assert loss.item() == pytest.approx(-sum(math.log(chance) for chance in chances), rel=1e-12)
        total += (-loss).exp().item()
    assert total == pytest.approx(1.0, rel=1e-12)


def test_ties_pull_scores_together_from_both_sides() -> None:
    """D > C > A = B. Kills: a tie read as an order; ties that teach nothing."""
    batch = compared((4,), (2, 2, 1, 0))
    s = torch.tensor([0.3, -0.4, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    both = sum(s[place].exp() for place in (0, 1))
    wanted = -sum(s) + (both + s[2].exp() + s[3].exp()).log() + (both + s[2].exp()).log() + 2 * both.log()
    loss = ranking_losses(s, batch).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    swapped = ranking_losses(s[[1, 0, 2, 3]], batch).sum()
    assert swapped.item() == pytest.approx(loss.item(), rel=1e-12)
    pair = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ranking_losses(pair, compared((2,), (0, 0))).sum().backward()
    assert pair.grad[0].item() == pytest.approx(-pair.grad[1].item(), rel=1e-12)
    assert pair.grad[0] > 0


def test_centring_adds_the_square_of_the_sum() -> None:
    """Kills: a centre per answer, under which chosen and rejected would both be pulled to 0."""
    s = scores(6)
    plain, centred = Reward().losses(s, PAIRS), Reward(centre=0.01).losses(s, PAIRS)
    torch.testing.assert_close(centred - plain, 0.01 * (s[::2] + s[1::2]) ** 2, rtol=1e-12, atol=1e-12)


def written(seed: int = 3) -> tuple[TinyLoaded, Adapter, Policy]:
    loaded = with_exact_norms(tiny_loaded("llama", dtype=torch.float64))
    adapter = LoRA(rank=2, targets=("q", "v", "down")).attach(loaded, seed=seed)
    return loaded, adapter, Policy(loaded, adapter.route)


def chance(policy: Policy, batch: Batch, document: int) -> tuple[Tensor, int]:
    """log p of an answer by hand, and how many tokens it has."""
    start = sum(batch.lengths[:document])
    end = start + batch.lengths[document]
    mine = (batch.sources >= start) & (batch.sources < end)
    logits = policy.logits(batch, batch.sources[mine])
    return logits.double().log_softmax(-1).gather(1, batch.targets[mine][:, None]).sum(), int(mine.sum())


@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "kto", "orpo"])
def test_the_losses_are_those_of_the_papers(variant: str) -> None:
    """Kills: a reference that is the policy; a mean where a sum belongs; an answer's token left out; sides swapped."""
    loaded, adapter, policy = written()
    disturb(adapter, size=0.3)
    beta, base, total = 0.3, Policy(loaded), 0.0
    for row in range(3):
        found = [chance(policy, PAIRS, 2 * row + side) for side in (0, 1)]
        (w, n_w), (_, n_l) = found
        h_w, h_l = (found[side][0] - chance(base, PAIRS, 2 * row + side)[0] for side in (0, 1))
        if variant == "sigmoid":
            total -= logsigmoid(beta * (h_w - h_l))
        elif variant == "ipo":
            total += (h_w / n_w - h_l / n_l - 1 / (2 * beta)) ** 2
        elif variant == "kto":
            total += (1 - torch.sigmoid(beta * h_w)) + (1 - torch.sigmoid(-beta * h_l))
        else:
            odds = [torch.log(torch.exp(p / n) / (1 - torch.exp(p / n))) for p, n in found]
            total += -w / n_w - beta * logsigmoid(odds[0] - odds[1])
    got = DPO(beta=beta, loss=variant).loss(policy, PAIRS)
    assert got.total.item() == pytest.approx(total.item(), rel=1e-9)
    assert got.weight == (6 if variant == "kto" else 3)


@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "kto", "orpo"])
def test_the_gradient_is_that_of_the_loss(variant: str) -> None:
    """Finite differences on three numbers. Kills: a gradient that goes through the reference."""
    _, adapter, policy = written()
    disturb(adapter, size=0.3)
    objective = DPO(loss=variant)
    objective.loss(policy, PAIRS).total.backward()
    for name in list(adapter.parameters)[:3]:
        parameter, step = adapter.parameters[name], 1e-5
        flat, wanted = parameter.data.view(-1), parameter.grad.view(-1)[1].item()
        found = []
        for move in (step, -2 * step):
            flat[1] += move
            with torch.no_grad():
                found.append(objective.loss(policy, PAIRS).total.item())
        flat[1] += step
        assert (found[0] - found[1]) / (2 * step) == pytest.approx(wanted, rel=2e-4, abs=1e-7)


@pytest.mark.parametrize("method", [LoRA(rank=2), TopLayers(layers=1)], ids=lambda method: method.kind)
def test_the_loss_begins_at_ln_2_and_the_reference_never_moves(method: LoRA | TopLayers) -> None:
    """Bit for bit, also of dropout in the policy. Kills: a reference with the adapter on; one that drops out."""
    loaded = tiny_loaded("llama", attention_dropout=0.3)
    before = bits(loaded.model)
    adapter = method.attach(loaded, seed=3)
    policy = Policy(loaded, adapter.route)
    reference = policy.train().reference_losses(PAIRS)
    policy.train(False)
    chances, ratios = DPO().chances(policy, PAIRS)
    assert torch.equal(ratios, torch.zeros(6))
    assert not ratios.equal(chances)
    assert DPO().loss(policy, PAIRS).total.item() / 3 == pytest.approx(math.log(2), abs=1e-6)
    optimizer = torch.optim.SGD(adapter.parameters.values(), lr=1.0)
    for _ in range(3):
        DPO().loss(policy, PAIRS).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert DPO().loss(policy, PAIRS).total.item() / 3 < math.log(2)
    assert torch.equal(policy.train().reference_losses(PAIRS), reference)
    assert policy.model.training, "what dropped out before drops out again"
    moved = {name for name, value in bits(loaded.model).items() if value != before[name]}
    assert moved <= set(adapter.parameters)


@pytest.mark.parametrize(
    "objective", [Reward(centre=0.1, margin=0.2), *(DPO(loss=v) for v in ("sigmoid", "ipo", "kto", "orpo"))]
)
def test_rows_add_up_however_they_are_cut(objective: Reward | DPO) -> None:
    """Kills: a mean over a micro-batch; a row whose answers are parted."""
    loaded, _, _ = written()
    loaded.predicts = Problem("reward") if isinstance(objective, Reward) else None
    adapter = LoRA(rank=2).attach(loaded, "other", seed=1)
    disturb(adapter, size=0.3)
    policy = Policy(loaded, adapter.route)
    halves = []
    for row in range(3):
        start = sum(PAIRS.lengths[: 2 * row])
        end = start + sum(PAIRS.lengths[2 * row : 2 * row + 2])
        mine = (PAIRS.sources >= start) & (PAIRS.sources < end)
        part = Batch(
            PAIRS.ids[start:end], PAIRS.positions[start:end], PAIRS.lengths[2 * row : 2 * row + 2],
            PAIRS.sources[mine] - start, PAIRS.targets[mine], ("a", "b"), answers=(2,), ranks=torch.tensor([0, 1]),
        )  # fmt: skip
        halves.append(objective.loss(policy, part))
    whole = objective.loss(policy, PAIRS)
    assert whole.total.item() == pytest.approx(sum(half.total.item() for half in halves), rel=1e-9)
    assert whole.weight == sum(half.weight for half in halves)


def test_rows_without_answers_are_named() -> None:
    for objective in (Reward(), DPO()):
        with pytest.raises(DataError, match="row:0"):
            objective.weight(tiny_batch())
