"""Divergences between teacher and student: against formulas in float64, their limits, gradients, and trl's function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_batch, tiny_loaded, with_exact_norms
from torch import Tensor

from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import ConfigError
from tunesmith.core.types import Batch, Likeliest
from tunesmith.models import distances
from tunesmith.models.distances import Distance, ask, coarse, likeliest
from tunesmith.models.policy import Policy
from tunesmith.objectives.distill import Distill

KINDS = (Distance("forward"), Distance("reverse"), Distance("jsd", 0.5), Distance("jsd", 0.2))


def logits(seed: int, rows: int = 5, outcomes: int = 11) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, outcomes, generator=draw, dtype=torch.float64)


P, Q = logits(1).log_softmax(-1), logits(2).log_softmax(-1)


def formula(distance: Distance, p: Any, q: Any) -> Any:
    """The definitions, with probabilities, in numpy."""

    def kl(a: Any, b: Any) -> Any:
        return (a * np.log(a / b)).sum(-1)

    b, m = distance.beta, distance.beta * p + (1 - distance.beta) * q
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": b * kl(p, m) + (1 - b) * kl(q, m)}[distance.kind]


@pytest.mark.parametrize("distance", KINDS, ids=str)
def test_divergences_are_their_formulas_and_never_below_zero(distance: Distance) -> None:
    """Kills: teacher and student exchanged; beta on the wrong side; a middle of logs; a gradient of the teacher."""
    wanted = formula(distance, P.exp().numpy(), Q.exp().numpy())
    np.testing.assert_allclose(distance(P, Q).numpy(), wanted, rtol=1e-12)
    assert (distance(P, Q) > 0).all()
    torch.testing.assert_close(distance(P, P), torch.zeros(5, dtype=torch.float64), atol=1e-15, rtol=0)
    assert torch.autograd.gradcheck(lambda z: distance(P, z.log_softmax(-1)), logits(3).requires_grad_())


def test_the_generalised_divergence_has_both_others_as_limits() -> None:
    """Kills: a beta that is the student's share."""
    near, far = Distance("jsd", 1e-6), Distance("jsd", 1 - 1e-6)
    torch.testing.assert_close(near(P, Q) / 1e-6, Distance("forward")(P, Q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(far(P, Q) / 1e-6, Distance("reverse")(P, Q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(Distance("jsd")(P, Q), Distance("jsd")(Q, P), rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", KINDS, ids=str)
def test_what_is_kept_of_a_teacher_keeps_all_mass_and_bounds_the_whole_from_below(distance: Distance) -> None:
    """Kills: a rest that is dropped, spread, or counted twice; other places of the student."""
    z, y = logits(4), logits(5)
    places, kept = likeliest(z, 4)
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (kept[:, :-1].diff(dim=-1) <= 0).all()
    whole = distance(z.log_softmax(-1), y.log_softmax(-1))
    assert (distance(kept, coarse(y, places)) <= whole + 1e-12).all()
    places, kept = likeliest(z, 10)  # all but one, which is the rest
    torch.testing.assert_close(distance(kept, coarse(y, places)), whole, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: distance(kept, coarse(x, places)), y.requires_grad_())


@pytest.mark.slow
def test_the_divergence_is_that_of_trl() -> None:
    """With its function of GKD, on all settings that both have. Kills: a convention of its own."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher = logits(6)[None], logits(7)[None]
    cases = {0.0: Distance("forward", temperature=1.5), 1.0: Distance("reverse", temperature=1.5)}
    for beta, ours in {**cases, 0.3: Distance("jsd", 0.3, 1.5)}.items():
        theirs = trainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=1.5, reduction="sum")
        p, q = (one[0] / 1.5 for one in (teacher, student))
        assert ours(p.log_softmax(-1), q.log_softmax(-1)).sum().item() == pytest.approx(theirs.item(), rel=1e-6)


# in a model


def test_a_teacher_is_not_asked_for_all_of_its_tokens() -> None:
    """Kills: a rest without mass, whose logarithm is not finite."""
    policy, batch, _ = setting(False)
    assert policy.teacher is not None
    with pytest.raises(ConfigError, match="97 is not below the vocabulary"):
        ask(policy.teacher, batch, 97, 1.0)
    assert ask(policy.teacher, batch, 96, 1.0).logprobs.isfinite().all()


def setting(head_trains: bool) -> tuple[Policy, Batch, dict[str, Any]]:
    """A student under a policy with a teacher beside it, in float64, and what trains."""
    student, teacher = (with_exact_norms(tiny_loaded("llama", seed=seed)) for seed in (0, 7))
    for loaded in (student, teacher):
        loaded.model.double()
    targets = ("q", "v", "head") if head_trains else ("q", "v")
    adapter = LoRA(rank=2, targets=targets).attach(student, seed=0)
    draw = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    policy = Policy(student, adapter.route)
    policy.teacher = Policy(teacher)
    return policy, tiny_batch((7, 9, 5), 0), adapter.parameters


def plainly(policy: Policy, batch: Batch, objective: Distill) -> Tensor:
    """The same from whole matrices of logits."""
    assert policy.teacher is not None
    hidden = policy.hidden(batch, batch.sources)
    with policy.route.enter():
        z = policy.head_logits(hidden)
    with torch.no_grad():
        p = policy.teacher.head_logits(policy.teacher.hidden(batch, batch.sources)) / objective.temperature
    if objective.top_k:
        places, said = likeliest(p, objective.top_k)
        apart = objective.distance(said, coarse(z / objective.temperature, places))
    else:
        apart = objective.distance(p.log_softmax(-1), (z / objective.temperature).log_softmax(-1))
    hard = torch.nn.functional.cross_entropy(z, batch.targets, reduction="none")
    return ((1 - objective.hard) * objective.temperature**2 * apart + objective.hard * hard).sum()


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("top_k", [None, 5])
def test_chunks_give_the_loss_and_gradients_of_whole_matrices(
    head_trains: bool, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a chunk left out or repeated; a gradient of another chunk, temperature or share; a stale kept row."""
    monkeypatch.setattr(distances, "chunk_rows", lambda device: 4)
    policy, batch, parameters = setting(head_trains)
    objective = Distill(teacher="x", divergence="jsd", beta=0.3, temperature=1.7, hard=0.25, top_k=top_k)
    wanted = torch.autograd.grad(plainly(policy, batch, objective), list(parameters.values()))
    if top_k:
        assert policy.teacher is not None
        said = policy.teacher.head_logits(policy.teacher.hidden(batch, batch.sources)).detach() / 1.7
        places, kept = likeliest(said, top_k)
        batch, policy.teacher = replace(batch, likeliest=Likeliest(places.int(), kept)), None
    found = objective.loss(policy, batch)
    assert found.weight == len(batch.targets)
    gradients = torch.autograd.grad(3 * found.total, list(parameters.values()))
    for name, ours, theirs in zip(parameters, gradients, wanted, strict=True):
        torch.testing.assert_close(ours, 3 * theirs, rtol=1e-9, atol=1e-12, msg=name)
    shares = 0.75 * 1.7**2 * found.facts["divergence"] + 0.25 * found.facts["hard_loss"]
    torch.testing.assert_close(found.total.detach(), shares, rtol=1e-12, atol=0)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    """Kills: a teacher under another route; dropout in it."""
    policy, batch, parameters = setting(False)
    policy.teacher = policy.under(policy.route)
    found = Distill(teacher="x").loss(policy, batch)
    assert abs(found.total.item()) < 1e-12
    gradients = torch.autograd.grad(found.total, list(parameters.values()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-9


def test_heads_of_unequal_padding_are_compared_where_both_have_tokens() -> None:
    """Kills: a crash on, or mass in, rows of the embedding that no token has."""
    policy, batch, _ = setting(False)
    wide = tiny_loaded("llama", seed=7, vocab_size=105)
    policy.teacher = Policy(wide)
    found = policy.taught(batch, Distance(), 0.0)
    p = policy.teacher.head_logits(policy.teacher.hidden(batch, batch.sources))[:, :97].double()
    with policy.route.enter():
        q = policy.head_logits(policy.hidden(batch, batch.sources))
    torch.testing.assert_close(
        found[1], Distance()(p.log_softmax(-1), q.log_softmax(-1)).detach(), rtol=1e-5, atol=1e-6
    )
