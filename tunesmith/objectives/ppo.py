"""Proximal policy optimisation of text: tokens are actions, the reward comes with the last, a value head expects it.

Policy, reference and values share one base: the reference is a route, the head reads the policy's own states, so that
both come from one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from tunesmith.objectives.objective import Policy
from tunesmith.objectives.sampled import Credit, Sampled, Written, actions_of, divergence, ratio_shares, surrogate

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Batch, Mean

VALUE_SHARE = 0.1  # of the value's loss in the whole
GAIN, MOST = 0.1, 0.2  # of the adaptive penalty: K_beta, and the largest error that counts


class PPO(Sampled):
    """Learn from a reward, token by token (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, 1909.08593).

    Attributes:
        kl: taken off the reward of each token for each nat that it is likelier than under the reference.
        kl_in: `reward`, or `loss`: there it is the weight of an estimate of the divergence, as in GRPO.
        kl_target: nats a token that the divergence is to come to; `kl` is then where its weight begins.
        epochs: how often each completion is used.
        minibatches: updates that an epoch is cut into; a rollout is of that many times `train.rows_per_step` prompts.
        gamma: what a reward is worth one token earlier.
        lambda: of the advantages, between what the next value says (0) and what really came (1).
    """

    kind: Literal["ppo"] = "ppo"
    kl: float = Field(default=0.05, ge=0, le=100)
    kl_in: Literal["reward", "loss"] = "reward"
    kl_target: float | None = Field(default=None, gt=0, le=100)
    epochs: int = Field(default=4, ge=1, le=64)
    minibatches: int = Field(default=4, ge=1, le=1024)
    gamma: float = Field(default=1.0, gt=0, le=1)
    # a keyword of Python, and the name that everybody knows it by
    __annotations__["lambda"] = "float"
    vars()["lambda"] = Field(default=0.95, ge=0, le=1)

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.kl_target is not None and (not self.kl or self.kl_in == "loss"):
            raise ValueError("kl_target moves a kl that is paid in the reward: set kl above 0, and kl_in to reward")
        return self

    @property
    def adapts(self) -> bool:
        """Whether `kl` changes from rollout to rollout."""
        return self.kl_target is not None

    def adapted(self, nats: float) -> float:
        """`kl` for the rollout after one that was so many nats a token from the reference.

        Ziegler et al. 2019, arXiv 1909.08593, section 2.2; theirs are nats a completion.
        """
        if self.kl_target is None:
            return self.kl
        error = (nats - self.kl_target) / self.kl_target
        return self.kl * (1 + GAIN * min(max(error, -MOST), MOST))

    @property
    def passes(self) -> int:
        """How often each completion is used."""
        return self.epochs

    @property
    def parts(self) -> int:
        """Updates of an epoch."""
        return self.minibatches

    @property
    def has_values(self) -> bool:
        """It has."""
        return True

    def credit(self, groups: Sequence[Sequence[Written]]) -> list[list[Credit]]:
        """Advantages, whitened over all tokens of the rollout, and returns."""
        import torch

        written, lam = [one for group in groups for one in group], getattr(self, "lambda")
        found = [gae(self.rewards(one), _known(one.values), self.gamma, lam) for one in written]
        white = whitened(torch.cat([advantages for advantages, _ in found])).split([one.actions for one in written])
        return [[Credit(one, returns)] for one, (_, returns) in zip(white, found, strict=True)]

    def rewards(self, one: Written) -> Tensor:
        """What each token earns, [actions]: the cost of leaving the reference, and with the last the reward."""
        old = _known(one.old)
        free = one.reference is None or self.kl_in == "loss"
        earned = old.new_zeros(one.actions) if free else -self.kl * (old - _known(one.reference))
        earned[-1] += one.reward
        return earned

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum over actions of -min(r A, clamp(r) A), the values' clipped squared error, and the divergence if asked."""
        import torch

        from tunesmith.core.types import Mean

        actions = actions_of(batch)
        losses, values = policy.at(self.temperature).valued(batch)
        logprobs, old, returns = -losses, _known(actions.old), _known(actions.returns)
        before = _known(actions.values)
        gain, held = surrogate(logprobs, old, actions.advantages, self.clip)
        near = before + (values - before).clamp(-self.clip, self.clip)
        wrong = 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
        total = -gain.sum() + VALUE_SHARE * wrong.sum()
        facts = {
            "entropy": -logprobs.detach().sum(),
            "clip_share": held.sum(),
            "value_loss": wrong.detach().sum(),
            **ratio_shares(logprobs, old),
        }
        if actions.reference is not None:
            apart = divergence(logprobs, actions.reference)
            total = total + self.kl * apart.sum() if self.kl_in == "loss" else total
            facts["kl"] = apart.detach().sum()
        return Mean(total, self.weight(batch), facts)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one completion, both [actions] (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    Nothing comes after the last action, whether the completion ended by itself or at the limit.

    Args:
        rewards, values: [actions]; a value is what was expected before its action.
    """
    advantages, later, after = rewards.new_zeros(len(rewards)), 0.0, 0.0
    for place in range(len(rewards) - 1, -1, -1):
        surprise = float(rewards[place]) + gamma * after - float(values[place])
        later = surprise + gamma * lam * later
        advantages[place], after = later, float(values[place])
    return advantages, advantages + values


def whitened(values: Tensor) -> Tensor:
    """[n] with mean 0 and variance 1, in float64 on the way."""
    wide = values.double()
    return ((wide - wide.mean()) / (wide.var(correction=0) + 1e-8).sqrt()).to(values.dtype)


def _known(held: Tensor | None) -> Tensor:
    assert held is not None
    return held
