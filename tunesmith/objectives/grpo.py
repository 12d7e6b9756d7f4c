"""Group-relative policy optimisation: several completions of a prompt, each held against the others (GRPO, RLOO).

The unit is an action, a token that the model wrote: the mean is over all tokens of a step (as Yu et al. 2025, arXiv
2503.14476, eq. 8, have it), so that a long answer is not taught less a token than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.objectives.objective import Policy
from tunesmith.objectives.sampled import Credit, Sampled, Written, actions_of, divergence, ratio_shares, surrogate

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Batch, Mean

TINY = 1e-4  # beside the deviation of a group: one in which all are equal divides by it


class GRPO(Sampled):
    """Learn from a reward by comparing completions of the same prompt.

    Attributes:
        group: completions of a prompt.
        advantage: `group` is (r - mean) / deviation (Shao et al. 2024, arXiv 2402.03300, section 4.1.2); `rloo` is r
            less the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740): prompts on which nearly all
            completions earn the same do not count more (Liu et al. 2025, arXiv 2503.20783).
        iterations: updates that use the same completions; from the second on `clip` acts.
    """

    kind: Literal["grpo"] = "grpo"
    group: int = Field(default=8, ge=2, le=1024)
    advantage: Literal["group", "rloo"] = "group"
    iterations: int = Field(default=1, ge=1, le=64)

    @property
    def completions(self) -> int:
        """Of each prompt."""
        return self.group

    @property
    def passes(self) -> int:
        """How often each completion is used."""
        return self.iterations

    def credit(self, groups: Sequence[Sequence[Written]]) -> list[list[Credit]]:
        """The same for all tokens of a completion."""
        import torch

        found = []
        for group in groups:
            rewards = torch.tensor([one.reward for one in group], dtype=torch.float64)
            shares = self.advantages(rewards).float()
            found.append([Credit(share.expand(one.actions)) for share, one in zip(shares, group, strict=True)])
        return found

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [group] of the rewards [group] of one prompt; they add up to 0."""
        if self.advantage == "rloo":
            # r - (sum - r) / (n - 1)
            return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))
        return (rewards - rewards.mean()) / (rewards.std() + TINY)

    def loss(self, policy: Policy, batch: Batch) -> Mean:
        """Sum over actions of -min(r A, clamp(r) A) + kl D (arXiv 2402.03300, eq. 3, D its eq. 4)."""
        from tunesmith.core.types import Mean

        actions = actions_of(batch)
        logprobs = -policy.at(self.temperature).token_losses(batch)
        # written by the policy as it is: the ratio is 1, and its gradient that of the log-probability
        old = logprobs.detach() if actions.old is None else actions.old
        gain, held = surrogate(logprobs, old, actions.advantages, self.clip)
        total, facts = -gain.sum(), {"entropy": -logprobs.detach().sum(), "clip_share": held.sum()}
        if actions.old is not None:
            facts |= ratio_shares(logprobs, old)
        if actions.reference is not None:
            apart = divergence(logprobs, actions.reference)
            total = total + self.kl * apart.sum()
            facts["kl"] = apart.detach().sum()
        return Mean(total, self.weight(batch), facts)
