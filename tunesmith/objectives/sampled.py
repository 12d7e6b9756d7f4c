"""Objectives over what the model writes itself: their common keys, and the clipped objective that they share.

Here is arithmetic alone. Who asks the model for completions, has them rewarded and lays them out as a batch is
`run/rollouts.py`; what a reward is, `evaluate/rewards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from tunesmith.core.errors import ConfigError
from tunesmith.objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.types import Actions, Batch


EDGES = (0.5, 0.8, 0.9, 0.97, 1.03, 1.1, 1.25, 2.0)  # of the ratios that are counted together
RATIOS = (*(f"ratio_to_{edge:g}" for edge in EDGES), f"ratio_above_{EDGES[-1]:g}")


def _listed(value: Any) -> Any:
    """Sections of one reward or a list: `x`, `file.py:function`, a run's folder, or `{kind: x, weight: w, ...}`."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError("a reward is needed: a name, file.py:function, or a list of them")
    return tuple(_section(entry) for entry in entries)


def _section(entry: Any) -> dict[str, Any]:
    if isinstance(entry, dict) and isinstance(entry.get("kind"), str):
        return entry
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"a reward is a name, file.py:function, a run's folder, or {{kind: X, ...}}, not {entry!r}")
    path, _, function = entry.rpartition(":")
    if path.endswith(".py") and function:
        return {"kind": "python", "function": entry}
    return {"kind": "run", "run": entry} if "/" in entry else {"kind": entry}


def _written(rewards: tuple[dict[str, Any], ...]) -> Any:
    # the shortest spelling that reads back to the same
    plain = [entry["kind"] if set(entry) == {"kind"} else entry for entry in rewards]
    return plain[0] if len(plain) == 1 else plain


Rewards = Annotated[tuple[dict[str, Any], ...], BeforeValidator(_listed), PlainSerializer(_written)]
"""Sections of rewards, whose kinds are in `evaluate.rewards`."""


@dataclass(frozen=True)
class Written:
    """A completion as an objective judges it; tensors are float32 [actions], its tokens.

    Attributes:
        reward: what it earned as a whole.
        old, reference, values: see `core.types.Actions`.
    """

    actions: int
    reward: float
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Credit:
    """What every token of a completion gets of its reward; float32 [actions]."""

    advantages: Tensor
    returns: Tensor | None = None


class Sampled(Objective):
    """What objectives over a model's own completions have in common.

    Attributes:
        reward: what a completion earns: a name, file.py:function, the folder of a reward model's run, or a list of
            sections with weights that add up.
        kl: how much it costs to move away from the reference, the model as the run received it.
        clip: how far the probability of a token may move before it counts no more.
        max_new_tokens: of a completion; its end token is one of them.
        temperature: that completions are drawn with; the policy that learns has it as well.
    """

    reward: Rewards = Field(default=({"kind": "exact_answer"},))
    kl: float = Field(default=0.04, ge=0, le=100)
    clip: float = Field(default=0.2, gt=0, lt=1)
    max_new_tokens: int = Field(default=64, ge=1, le=100_000)
    temperature: float = Field(default=1.0, gt=0, le=100)

    @property
    def answered(self) -> int:
        """The longest completion, in tokens."""
        return self.max_new_tokens

    @property
    def adapts(self) -> bool:
        """Whether `kl` changes from rollout to rollout."""
        return False

    def adapted(self, nats: float) -> float:
        """`kl` for the rollout after one that was so many nats a token from the reference."""
        return self.kl

    @property
    def needs_old(self) -> bool:
        """Whether log-probabilities have to be known before the first update."""
        return self.passes * self.parts > 1

    def check(self, config: dict[str, Any]) -> None:
        """Refuses what does not write from left to right. Raises ConfigError."""
        from tunesmith.models.families import family_of

        family = family_of(config)
        if family.kind != "decoder":
            raise ConfigError(
                f"{self.kind} learns from text that the model goes on with, and {family.name} is no decoder",
                where="objective",
                hint="take a decoder such as smollm2-135m",
            )

    def weight(self, batch: Batch) -> float:
        """Actions of the batch: tokens that the model has written."""
        return int(batch.targets.numel())

    def credit(self, groups: Sequence[Sequence[Written]]) -> list[list[Credit]]:
        """What each token gets, for the completions of each prompt."""
        raise NotImplementedError


def actions_of(batch: Batch) -> Actions:
    """The actions of a batch; without any (in a plan) such as change nothing."""
    from tunesmith.core.types import Actions

    if batch.actions is not None:
        return batch.actions
    none = batch.targets * 0.0
    return Actions(none, none, none, none, none)


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped objective of each action, min(r A, clamp(r, 1 - clip, 1 + clip) A), and where clipping acts.

    r is the ratio of the probabilities now and when it was written (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Args:
        logprobs, old, advantages: [actions].

    Returns:
        Two of [actions]: to be made large, differentiable in `logprobs`; and bool, where nothing is learnt any more.
    """
    import torch

    ratio = (logprobs - old).exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(free, held), held.detach() < free.detach()


def ratio_shares(logprobs: Tensor, old: Tensor) -> dict[str, Tensor]:
    """How many actions have a ratio between which of EDGES, by RATIOS: a histogram for the log.

    Args:
        logprobs, old: [actions].
    """
    import torch

    ratio = (logprobs.detach() - old).exp()
    places = torch.bucketize(ratio, torch.tensor(EDGES, device=ratio.device, dtype=ratio.dtype))
    return {name: (places == place).sum() for place, name in enumerate(RATIOS)}


def divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each action that the policy drew: q - log q - 1, never below 0.

    q is reference over policy (Schulman 2020, "Approximating KL Divergence", k3; GRPO's eq. 4).

    Args:
        logprobs, reference: [actions].
    """
    log_q = reference - logprobs
    return log_q.exp() - log_q - 1
