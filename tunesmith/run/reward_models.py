"""Reward models beside the policy: adapters with heads on the base that writes, each under a route of its own.

The one idea: they cost their adapters and no second model, and none of what they hold can train. What they are asked
about is whole documents, prompt and completion with its end token; their scores are read at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tunesmith.data.batch import to_batch
from tunesmith.data.encode import Example
from tunesmith.evaluate.losses import BATCH_TOKENS, batches
from tunesmith.evaluate.rewards.trained import Trained
from tunesmith.models.modes import evaluating
from tunesmith.run.starting import beside

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy


class RewardModels:
    """The reward models of a run; none scores 0.

    Args:
        rewards: which runs they are of, and what each counts.

    Raises AdapterError for one of another base.
    """

    def __init__(self, loaded: Loaded, rewards: Sequence[Trained]) -> None:
        self.routes = []
        for number, reward in enumerate(rewards):
            self.routes.append((reward.weight, beside(loaded, reward.adapter, f"reward-{number}").route))

    @torch.no_grad()
    def scores(self, policy: Policy, documents: Sequence[Example]) -> list[float]:
        """What all of them say of each document, weighted and added up."""
        found = [0.0] * len(documents)
        if not self.routes:
            return found
        device = next(policy.model.parameters()).device
        with evaluating(policy.model):
            for rows in batches(documents, BATCH_TOKENS):
                batch = to_batch([documents[row] for row in rows]).to(device)
                for weight, route in self.routes:
                    for row, score in zip(rows, policy.under(route).scores(batch)[:, 0].tolist(), strict=True):
                        found[row] += weight * score
        return found
