"""Rollouts: what the policy, as it is at a step, writes for the prompts of the step, rewarded and laid out to learn.

The one idea: a rollout is a function of (weights, seed, place in the data). One that serves several updates is kept
on disk before the first of them, so that a run that is killed anywhere goes on with the very same one.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tunesmith.core.rng import seed_for
from tunesmith.core.types import Actions, Batch
from tunesmith.data.batch import to_batch
from tunesmith.data.encode import Example, Prompt, encode_row
from tunesmith.data.pack import Cursor, Step, cut
from tunesmith.data.rows import Message
from tunesmith.evaluate.rewards import open_rewards
from tunesmith.evaluate.rewards.trained import Trained
from tunesmith.models.generate import generate
from tunesmith.models.heads import value_head
from tunesmith.models.route import Route
from tunesmith.objectives.sampled import Sampled, Written
from tunesmith.parallel.world import ALONE, Alone
from tunesmith.run.kept_rollouts import Kept, Rollout, from_plain, plain
from tunesmith.run.reward_models import RewardModels
from tunesmith.run.watching import Shown, Signs

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.run.prepare import Prepared

AT_ONCE = 64  # completions that are written together
SHOWN = 10  # completions of a rollout that are kept for people
Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Turn(Step[Any]):
    """An update: prompts whose completions it learns from, or, once they are written, those completions.

    Attributes:
        place: where its prompts begin in the data.
        turn: how many updates their completions have served before.
    """

    place: Cursor = field(default_factory=Cursor)
    turn: int = 0


class Rollouts:
    """The steps of a run whose rows are prompts, and the completions of each.

    Args:
        policy: what writes and learns; it gets a value head where the objective asks for one.
        received: the route of the model as the run received it: the reference.
        world: processes that share the completions of a rollout out; each knows all that was written.
    """

    def __init__(
        self,
        prepared: Prepared,
        loaded: Loaded,
        policy: Policy,
        received: Route,
        folder: Path,
        world: Alone = ALONE,
    ) -> None:
        objective = prepared.config.objective
        assert isinstance(objective, Sampled)
        self.prepared, self.loaded, self.policy, self.objective = prepared, loaded, policy, objective
        self.world = world
        # what costs nothing is not computed
        self.reference = policy.under(received) if objective.kl else None
        if objective.has_values:
            policy.value = value_head(loaded, prepared.config.train.seed)
        rewards = open_rewards(objective.reward)
        self.rewards = [reward for reward in rewards if not isinstance(reward, Trained)]
        self.models = RewardModels(loaded, [reward for reward in rewards if isinstance(reward, Trained)])
        self.seed, self.updates = prepared.config.train.seed, objective.passes * objective.parts
        self.kl = torch.tensor(objective.kl, dtype=torch.float64)
        self.kept = Kept(folder / "rollouts", prepared.config.train, self.updates)
        self.minibatches: list[list[Rollout]] = []
        self.shown: list[Rollout] = []
        self.writing_cpu_seconds = 0.0

    @property
    def memory(self) -> dict[str, Tensor]:
        """What changes from rollout to rollout, for checkpoints."""
        return {"objective.kl": self.kl} if self.objective.adapts else {}

    def stream(self, cursor: Cursor) -> Iterator[Turn]:
        """The updates from a cursor on, with prompts for rows; completions are written when an update begins."""
        start, turn = replace(cursor, turn=0), cursor.turn
        for step in self.prepared.stream(start):
            for number in range(turn, self.updates):
                is_last = number + 1 == self.updates
                after = step.cursor if is_last else replace(start, turn=number + 1)
                dropped = step.dropped if number == 0 else {}
                yield Turn(step.number, step.micro_batches, after, step.epoch, dropped, place=start, turn=number)
            start, turn = step.cursor, 0

    def __call__(self, step: Turn, number: int) -> tuple[Turn, Record]:
        """The update with completions for prompts, and what there is to tell of them."""
        facts: Record = {}
        if step.turn == 0:
            began = time.monotonic()
            self.minibatches = self._made([prompt for rows in step.micro_batches for prompt in rows], step.place)
            facts = self._facts() | {"rollout_seconds": round(time.monotonic() - began, 6)}
            facts["writing_cpu_seconds"] = round(self.writing_cpu_seconds, 6)
            facts |= self._adapted()
            if self.updates > 1:
                self.world.first(lambda: self.kept.write(number, self.minibatches))
        elif not self.minibatches:
            self.minibatches = self.kept.read(number - step.turn)
        return replace(step, micro_batches=self._laid(self.minibatches[step.turn % len(self.minibatches)])), facts

    def _made(self, prompts: Sequence[Prompt], place: Cursor) -> list[list[Rollout]]:
        """Completions of prompts with their advantages, by update."""
        written, count = self._gathered(self._written(prompts, place)), self.objective.completions
        share = count * math.ceil(len(prompts) / self.objective.parts)
        known = [one for some in _parts(written, share) for rows in self._laid(some) for one in self._known(rows)]
        judged = self._gathered(known)
        objective = self.objective.model_copy(update={"kl": self.kl.item()})
        credits_ = objective.credit(_parts([_judged(one) for one in judged], count))
        done = [replace(judged[number], **vars(credit)) for number, credit in enumerate(chain(*credits_))]
        return [list(some) for some in _parts(done, share)]

    def _laid(self, update: Sequence[Rollout]) -> list[list[Rollout]]:
        """The micro-batches of this process; completions of a prompt stay together, because they share it."""
        return cut(
            [one for group in self._mine(_parts(update, self.objective.completions)) for one in group],
            self.prepared.sizes,
        )

    def _mine(self, values: Sequence[T]) -> Sequence[T]:
        return values[self.world.rank :: self.world.size]

    def _gathered(self, mine: list[Rollout]) -> list[Rollout]:
        """Those of all processes, by number."""
        if self.world.size > 1:
            told = self.world.told({"rollouts": [plain(one) for one in mine]})
            mine = [from_plain(one) for facts in told for one in facts["rollouts"]]
        return sorted(mine, key=lambda one: one.number)

    def _adapted(self) -> Record:
        """The weight of the divergence that this rollout was judged with; it is then that of the next."""
        if not self.objective.adapts:
            return {}
        facts = {"kl_weight": self.kl.item()}
        every = list(chain(*self.minibatches))
        apart = math.fsum(one.nats_apart for one in every)
        now = self.objective.model_copy(update={"kl": self.kl.item()})
        self.kl.fill_(now.adapted(apart / sum(one.actions for one in every)))
        return facts

    def _written(self, prompts: Sequence[Prompt], place: Cursor) -> list[Rollout]:
        """The completions of this process's prompts, one prompt after the other, rewarded."""
        objective, dataset = self.objective, self.prepared.train
        every = [prompt for prompt in prompts for _ in range(objective.completions)]
        numbers = [number for group in self._mine(_parts(range(len(every)), objective.completions)) for number in group]
        asked = [every[number] for number in numbers]
        began = time.process_time()
        found = generate(
            self.loaded,
            self.policy.route,
            [prompt.ids for prompt in asked],
            max_new_tokens=objective.max_new_tokens,
            stop_ids={stop for prompt in prompts for stop in dataset.template_of(prompt.dialogue).stop_ids},
            temperature=objective.temperature,
            seed=seed_for(self.seed, "rollouts", place.epoch, place.position),
            numbers=numbers,
            batch_size=AT_ONCE,
        )
        self.writing_cpu_seconds = time.process_time() - began
        rollouts = []
        for number, prompt, answer in zip(numbers, asked, found, strict=True):
            # the end token is an action: a model that never learns to stop would be paid for it
            ids = answer.ids + ([] if answer.end is None else [answer.end])
            learnt = [False] * len(prompt.ids) + [True] * len(ids)
            example = Example(prompt.ids + ids, learnt, prompt.dialogue.where)
            text = self.prepared.codec.decode(answer.ids).strip()
            rollouts.append(
                Rollout(number, example, prompt.question, text, self.verified(prompt, text), answer.stopped)
            )
        scores = self.models.scores(self.policy, [one.example for one in rollouts])
        return [replace(one, reward=one.reward + score) for one, score in zip(rollouts, scores, strict=True)]

    def watchers(self, folder: Path) -> list[Shown | Signs]:
        """Who sees every record of the run: what is shown of its completions is kept, and signs of trouble are told."""
        return [Shown(folder / "rollouts.jsonl", self.taken), Signs()]

    def taken(self) -> list[Rollout]:
        """Completions to be shown, once."""
        shown, self.shown = self.shown, []
        return shown

    def constant(self, most: int = 200) -> Record:
        """The commonest answer of the first rows, and what it earns when it is said to all of them."""
        found = (self.prepared.train.prompt(*place) for place in self.prepared.train.places())
        prompts = list(islice((prompt for prompt in found if isinstance(prompt, Prompt)), most))
        text = Counter(prompt.dialogue.completion for prompt in prompts).most_common(1)[0][0].strip()
        return {"text": text, "reward": self.earned(prompts, [text] * len(prompts))}

    def earned(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> float:
        """The mean reward of texts that were not drawn here, one for each prompt."""
        pairs = list(zip(prompts, texts, strict=True))
        said = [self._document(prompt, text) for prompt, text in pairs] if self.models.routes else []
        scores = self.models.scores(self.policy, said)
        return (sum(self.verified(prompt, text) for prompt, text in pairs) + sum(scores)) / len(pairs)

    def verified(self, prompt: Prompt, text: str) -> float:
        """What a completion earns of all rewards but those of models."""
        return sum(reward.weight * reward(prompt, text) for reward in self.rewards)

    def _document(self, prompt: Prompt, text: str) -> Example:
        """A row with a completion that nobody wrote, as it would be learnt from."""
        said = replace(prompt.dialogue, messages=(*prompt.dialogue.prompt, Message("assistant", text, supervised=True)))
        found = encode_row(said, self.prepared.train.template_of(said), self.prepared.codec, sys.maxsize)
        assert isinstance(found, Example)
        return found

    @torch.no_grad()
    def _known(self, rows: Sequence[Rollout]) -> list[Rollout]:
        """Completions of a micro-batch with what the models say of their tokens: as in the update, bit for bit."""
        objective, batch = self.objective, self.collate(rows)
        batch = batch.to(next(self.loaded.model.parameters()).device)
        found: dict[str, Tensor] = {}
        if objective.has_values:
            losses, found["values"] = self.policy.at(objective.temperature).valued(batch)
            found["old"] = -losses
        elif objective.needs_old:
            found["old"] = -self.policy.at(objective.temperature).token_losses(batch)
        if self.reference is not None:
            found["reference"] = -self.reference.at(objective.temperature).token_losses(batch)
        parts = {name: held.float().cpu().split([one.actions for one in rows]) for name, held in found.items()}
        return [replace(one, **{name: part[place] for name, part in parts.items()}) for place, one in enumerate(rows)]

    @staticmethod
    def collate(rows: Sequence[Rollout]) -> Batch:
        """Completions as a batch, with what is known of their tokens."""
        batch = to_batch([one.example for one in rows])
        names = ("advantages", "old", "reference", "values", "returns")
        laid = {name: [getattr(one, name) for one in rows] for name in names}
        joined: Any = {name: None if held[0] is None else torch.cat(held) for name, held in laid.items()}
        return batch if joined["advantages"] is None else replace(batch, actions=Actions(**joined))

    def _facts(self) -> Record:
        """What the log has of a rollout: means over its completions; some of them are taken to be shown."""
        every = list(chain(*self.minibatches))
        self.shown = sorted(every, key=lambda one: seed_for(self.seed, "shown", one.number))[:SHOWN]
        facts = {
            "reward": sum(one.reward for one in every) / len(every),
            "completion_tokens": sum(one.actions for one in every) / len(every),
            "stopped": sum(one.stopped for one in every) / len(every),
        }
        groups = _parts(every, self.objective.completions)
        if self.objective.completions > 1:
            facts["equal_groups"] = sum(len({one.reward for one in group}) == 1 for group in groups) / len(groups)
        return facts


def _parts(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _judged(one: Rollout) -> Written:
    return Written(one.actions, one.reward, one.old, one.reference, one.values)
