"""The arithmetic of objectives over a model's own completions, against the papers' formulas in float64 numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_batch, tiny_loaded
from torch import Tensor

from tunesmith.core.types import Actions, Batch
from tunesmith.models.heads import value_head
from tunesmith.models.policy import Policy
from tunesmith.objectives.grpo import GRPO
from tunesmith.objectives.ppo import PPO, VALUE_SHARE, gae, whitened
from tunesmith.objectives.sampled import EDGES, RATIOS, Written, divergence, ratio_shares, surrogate


class Fixed:
    """A policy whose log-probabilities and values are parameters."""

    def __init__(self, logprobs: Tensor, values: Tensor | None = None) -> None:
        self.logprobs, self.values = logprobs.requires_grad_(), values

    def at(self, temperature: float) -> Fixed:
        return self

    def token_losses(self, batch: Batch) -> Tensor:
        return -self.logprobs

    def valued(self, batch: Batch) -> tuple[Tensor, Any]:
        return -self.logprobs, self.values


def drawn(count: int = 40, seed: int = 0) -> tuple[Batch, dict[str, Tensor]]:
    """A batch of so many actions and float64 numbers for each."""
    draw = torch.Generator().manual_seed(seed)
    batch = tiny_batch((12, 15, count + 6 - 27))
    count = len(batch.targets)
    found = {name: torch.randn(count, generator=draw, dtype=torch.float64) for name in ("now", "a", "v", "r", "w")}
    found["now"] = -found["now"].abs()
    for name in ("old", "ref"):
        found[name] = found["now"] + 0.4 * torch.randn(count, generator=draw, dtype=torch.float64)
    return batch, found


def clipped(x: dict[str, np.ndarray], clip: float) -> np.ndarray:
    ratio = np.exp(x["now"] - x["old"])
    return np.minimum(ratio * x["a"], np.clip(ratio, 1 - clip, 1 + clip) * x["a"])


def test_the_loss_of_grpo_is_that_of_its_paper() -> None:
    """DeepSeekMath eq. 3 with eq. 4, summed over tokens. Kills: a sign, a bound, KL the other way."""
    batch, found = drawn()
    x = {name: value.numpy() for name, value in found.items()}
    k3 = np.exp(x["ref"] - x["now"]) - (x["ref"] - x["now"]) - 1
    wanted = (-clipped(x, 0.2) + 0.3 * k3).sum()
    actions = Actions(found["a"], found["old"], found["ref"])
    loss = GRPO(kl=0.3).loss(Fixed(found["now"]), replace(batch, actions=actions))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-12)
    assert loss.weight == len(x["now"])
    assert loss.facts["kl"].item() == pytest.approx(k3.sum())
    ratio = np.exp(x["now"] - x["old"])
    acts = ((ratio > 1.2) & (x["a"] > 0)) | ((ratio < 0.8) & (x["a"] < 0))
    assert 0 < loss.facts["clip_share"].item() == acts.sum() < len(ratio)


def test_the_loss_of_ppo_is_that_of_its_paper() -> None:
    """Kills: values that are not clipped, or clipped against the return; half an error."""
    batch, found = drawn()
    x = {name: value.numpy() for name, value in found.items()}
    near = x["v"] + np.clip(x["w"] - x["v"], -0.2, 0.2)
    value = 0.5 * np.maximum((x["w"] - x["r"]) ** 2, (near - x["r"]) ** 2)
    actions = Actions(found["a"], found["old"], found["ref"], found["v"], found["r"])
    loss = PPO().loss(Fixed(found["now"], found["w"]), replace(batch, actions=actions))  # type: ignore[arg-type]
    assert loss.total.item() == pytest.approx((-clipped(x, 0.2)).sum() + VALUE_SHARE * value.sum(), rel=1e-12)


def test_ppo_has_the_divergence_in_its_loss_where_it_is_asked_to() -> None:
    """Kills: one that is paid twice, or has no gradient."""
    batch, found = drawn()
    batch = replace(batch, actions=Actions(found["a"], found["old"], found["ref"], found["v"], found["r"]))
    here, there = PPO(kl=0.3, kl_in="loss"), PPO(kl=0.3)
    k3 = divergence(found["now"], found["ref"]).sum()
    more = (
        here.loss(Fixed(found["now"], found["w"]), batch).total
        - there.loss(Fixed(found["now"], found["w"]), batch).total
    )  # type: ignore[arg-type]
    assert more.item() == pytest.approx(0.3 * k3.item(), rel=1e-12)
    torch.testing.assert_close(
        *torch.autograd.grad(more, found["now"]),
        *torch.autograd.grad(0.3 * divergence(found["now"], found["ref"]).sum(), found["now"]),
    )
    assert here.rewards(Written(2, 5.0, -torch.ones(2), -2 * torch.ones(2), torch.zeros(2))).tolist() == [0.0, 5.0]


def test_the_weight_of_the_divergence_follows_its_target_as_in_the_paper() -> None:
    """Ziegler et al. 2019, section 2.2. Kills: a sign; an error without a bound, or not relative to the target."""
    for nats in (0.0, 0.09, 0.1, 0.105, 3.0):
        error = np.clip((nats - 0.1) / 0.1, -0.2, 0.2)
        assert PPO(kl=0.7, kl_target=0.1).adapted(nats) == pytest.approx(0.7 * (1 + 0.1 * error), rel=1e-12)
    assert PPO(kl=0.7).adapted(3.0) == 0.7
    for wrong in ({"kl": 0.0}, {"kl_in": "loss"}):
        with pytest.raises(ValueError, match="kl_target moves a kl that is paid in the reward"):
            PPO(kl_target=0.1, **wrong)


def test_every_ratio_is_counted_once() -> None:
    """Kills: the ratio upside down; a bin that is left out."""
    _, found = drawn()
    counts = ratio_shares(found["now"], found["old"])
    ratio = np.exp(found["now"].detach().numpy() - found["old"].numpy())
    wanted = np.histogram(ratio, [-np.inf, *EDGES, np.inf])[0]
    assert [int(counts[name]) for name in RATIOS] == wanted.tolist()
    assert sum(wanted[:4]) not in (0, sum(wanted[5:]), len(ratio))


@pytest.mark.parametrize("objective", [GRPO(kl=0.3), PPO()], ids=["grpo", "ppo"])
def test_gradients_are_those_of_the_losses(objective: Any) -> None:
    """Kills: a detach in the wrong place."""
    batch, found = drawn()
    actions = Actions(found["a"], found["old"], found["ref"], found["v"], found["r"])
    batch = replace(batch, actions=actions)

    def loss(now: Tensor, values: Tensor) -> Tensor:
        policy: Any = Fixed(now.clone().detach())
        policy.logprobs, policy.values = now, values
        return objective.loss(policy, batch).total

    assert torch.autograd.gradcheck(loss, (found["now"].requires_grad_(), found["w"].requires_grad_()))


def test_a_policy_that_has_not_moved_gets_the_gradient_of_reinforce() -> None:
    """Without `old` the ratio is 1 and its gradient is A grad log p. Kills: a ratio that is a constant."""
    batch, found = drawn()
    policy = Fixed(found["now"])
    loss = GRPO(kl=0.0).loss(policy, replace(batch, actions=Actions(found["a"])))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(-found["a"].sum().item(), rel=1e-12)
    torch.testing.assert_close(policy.logprobs.grad, -found["a"])
    assert loss.facts["clip_share"] == 0


def test_the_estimate_of_kl_is_unbiased_and_never_negative() -> None:
    """Against the sum over the vocabulary. Kills: KL of the reference from the policy."""
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(7, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    k3 = divergence(p, q)
    assert (k3 >= 0).all()
    assert (p.exp() * k3).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-12)
    assert (divergence(p, p) == 0).all()


def test_advantages_of_a_group_are_the_papers() -> None:
    """Kills: the mean of all for the mean of the others; a deviation of the whole rollout; nan for equal rewards."""
    rewards = np.array([0.0, 1.0, 1.0, 0.25])
    written = [Written(2, float(reward)) for reward in rewards]
    group = [credit.advantages.tolist() for credit in GRPO(group=4).credit([written])[0]]
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(group, np.stack([wanted, wanted], 1), rtol=1e-6)
    rloo = [credit.advantages[0].item() for credit in GRPO(group=4, advantage="rloo").credit([written])[0]]
    np.testing.assert_allclose(rloo, [r - (rewards.sum() - r) / 3 for r in rewards], rtol=1e-6)
    [equal] = GRPO(group=3).credit([[Written(1, 0.3)] * 3])
    assert all(abs(credit.advantages.item()) < 1e-9 for credit in equal)


def oracle(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Schulman et al. 2016, eq. 16, as the sum that it is."""
    after = np.append(values[1:], 0.0)
    deltas = rewards + gamma * after - values
    return np.array(
        [sum((gamma * lam) ** k * deltas[t + k] for k in range(len(deltas) - t)) for t in range(len(deltas))]
    )


def test_advantages_over_time_are_the_papers() -> None:
    """Kills: a value of the wrong place, lambda for gamma, a bootstrap behind the end."""
    draw = np.random.default_rng(0)
    rewards, values = draw.normal(size=9), draw.normal(size=9)
    advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), 0.9, 0.8)
    np.testing.assert_allclose(advantages, oracle(rewards, values, 0.9, 0.8), rtol=1e-12)
    np.testing.assert_allclose(returns, advantages + torch.tensor(values), rtol=1e-12)
    white = whitened(torch.tensor(values)).numpy()
    np.testing.assert_allclose(white, (values - values.mean()) / np.sqrt(values.var() + 1e-8), rtol=1e-12)


def test_the_reward_lands_on_the_last_token_and_leaving_the_reference_costs() -> None:
    """Kills: a reward for every token; a KL that pays."""
    old, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    earned = PPO(kl=0.1).rewards(Written(3, 5.0, old, reference, torch.zeros(3)))
    torch.testing.assert_close(earned, torch.tensor([-0.05, 0.1, 5.0]))
    assert PPO(kl=0.0).rewards(Written(3, 5.0, old, None, torch.zeros(3))).tolist() == [0.0, 0.0, 5.0]


def test_whitening_is_over_all_tokens_of_a_rollout() -> None:
    """Kills: whitening a completion at a time, which would make every one of them as good as bad."""
    made = [Written(n, float(n > 1), -torch.ones(n), None, torch.zeros(n)) for n in (3, 1)]
    credits_ = [credit for [credit] in PPO(kl=0.0).credit([[one] for one in made])]
    assert torch.cat([credit.advantages for credit in credits_]).mean().abs() < 1e-6
    assert (credits_[0].advantages > 0).all()
    assert (credits_[1].advantages < 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_temperature_divides_logits(family: str) -> None:
    """A cap comes before it. Kills: a temperature inside the cap; one that is forgotten."""
    loaded = tiny_loaded(family)
    batch, policy = tiny_batch(), Policy(loaded)
    with torch.no_grad():
        cold = policy.at(0.5)
        logits = policy.logits(batch, batch.sources) / 0.5
        wanted = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        torch.testing.assert_close(cold.token_losses(batch), wanted, rtol=1e-5, atol=1e-5)
        assert policy.at(1.0) is policy


def test_values_and_losses_come_from_the_states_before_the_tokens() -> None:
    """Kills: a value that has seen the token it is to judge; another forward pass for it."""
    loaded = tiny_loaded()
    batch, policy = tiny_batch(), Policy(loaded)
    policy.value = value_head(loaded, 0)
    with torch.no_grad():
        policy.value.weight.normal_()
        losses, values = policy.valued(batch)
        assert torch.equal(losses, policy.token_losses(batch))
        states = policy.hidden(batch)[batch.sources]
        torch.testing.assert_close(values, policy.value(states)[:, 0])


def test_what_is_clipped_teaches_nothing() -> None:
    """Kills: clipping that also acts where it would hide a loss."""
    now = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    gain, held = surrogate(now, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    gain.sum().backward()
    assert held.tolist() == [True, False, False, True]
    assert (now.grad == 0).tolist() == held.tolist()


@pytest.mark.slow
def test_the_loss_of_grpo_is_that_of_trl() -> None:
    """Its own function, token by token over a padded batch, gives the mean that ours is the sum of. Kills: as above."""
    from unittest.mock import MagicMock

    pytest.importorskip("trl", reason="trl is in the extra bench; the formula is held in float64 beside this")
    from trl.trainer.grpo_trainer import GRPOTrainer

    batch, found = drawn()
    ends = torch.tensor(batch.lengths).cumsum(0)
    counts = torch.searchsorted(ends, batch.sources, right=True).bincount().tolist()
    advantages = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)

    def padded(flat: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(flat.split(counts)), batch_first=True)

    now, mask = padded(found["now"]), padded(torch.ones_like(found["now"]))
    settings = {"top_entropy_quantile": 1.0, "importance_sampling_level": "token", "off_policy_mask_threshold": None}
    settings |= {"beta": 0.3, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "bnpo", "use_vllm": False}
    settings |= {"current_gradient_accumulation_steps": 1, "aux_loss_enabled": False, "_entropy_bonus_enabled": False}
    theirs = MagicMock(**settings)
    theirs.args.use_bias_correction_kl, theirs.args.delta = False, None
    theirs.accelerator.gather = lambda tensor: tensor
    theirs._get_per_token_logps_and_entropies.return_value = (now, torch.zeros_like(now), None)
    inputs = {"prompt_ids": mask.long(), "prompt_mask": mask.long(), "completion_ids": mask.long()}
    inputs |= {"completion_mask": mask, "advantages": advantages}
    inputs |= {"old_per_token_logps": padded(found["old"]), "ref_per_token_logps": padded(found["ref"])}
    wanted = GRPOTrainer._compute_loss(theirs, MagicMock(), inputs)
    actions = Actions(advantages.repeat_interleave(torch.tensor(counts)), found["old"], found["ref"])
    loss = GRPO(kl=0.3).loss(Fixed(found["now"]), replace(batch, actions=actions))
    assert loss.total.item() / loss.weight == pytest.approx(float(wanted), abs=1e-12)
