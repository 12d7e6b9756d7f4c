"""Steps in which the student answers some of the prompts itself, for a teacher to say how it would have gone on.

The one idea: which rows it answers, and what it draws, is a function of (weights, seed, place in the data), as in
`rollouts.py`; an update follows each, so that nothing has to be kept (Agarwal et al. 2023, arXiv 2306.13649, alg. 1).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunesmith.core.errors import DataError
from tunesmith.core.rng import seed_for
from tunesmith.data.encode import Example, Prompt, encode_row
from tunesmith.data.pack import Cursor, cut
from tunesmith.models.generate import generate
from tunesmith.objectives.distill import Distill
from tunesmith.run.rollouts import AT_ONCE, Record, Turn

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.run.prepare import Prepared


class OwnAnswers:
    """The steps of a run whose student writes a share of the answers that it learns from.

    Args:
        policy: the student.
    """

    def __init__(self, prepared: Prepared, loaded: Loaded, policy: Policy) -> None:
        objective = prepared.config.objective
        assert isinstance(objective, Distill)
        self.prepared, self.loaded, self.policy, self.objective = prepared, loaded, policy, objective
        self.seed = prepared.config.train.seed

    def stream(self, cursor: Cursor) -> Iterator[Turn]:
        """The updates from a cursor on, with prompts for rows; answers are written when an update begins."""
        start = cursor
        for step in self.prepared.stream(cursor):
            yield Turn(step.number, step.micro_batches, step.cursor, step.epoch, step.dropped, place=start)
            start = step.cursor

    def __call__(self, step: Turn, number: int) -> tuple[Turn, Record]:
        """The update with answers for prompts, and what there is to tell of those that the student wrote."""
        began = time.monotonic()
        prompts = [prompt for rows in step.micro_batches for prompt in rows]
        found = [None if self._is_own(step.place, place) else self._given(one) for place, one in enumerate(prompts)]
        asked = [prompt for prompt, given in zip(prompts, found, strict=True) if given is None]
        written = self._written(asked, step.place)
        own = iter(written)
        rows = [next(own) if given is None else given for given in found]
        facts: Record = {"own_share": len(written) / len(rows), "rollout_seconds": round(time.monotonic() - began, 6)}
        if written:
            facts["completion_tokens"] = sum(one.answer_tokens for one in written) / len(written)
        return replace(step, micro_batches=cut(rows, self.prepared.sizes)), facts

    def _is_own(self, place: Cursor, row: int) -> bool:
        """Whether the student answers a row of a step itself."""
        return seed_for(self.seed, "own answers", place.epoch, place.position, row) < self.objective.on_policy * 2**63

    def _given(self, prompt: Prompt) -> Example | None:
        """A row with the answer that the data has; None where it does not fit. Raises DataError where there is none."""
        dialogue, section = prompt.dialogue, self.prepared.config.data
        if not dialogue.completion:
            hint = "objective.on_policy: 1 needs none"
            raise DataError("there is no answer in this row", where=dialogue.where, hint=hint)
        template = self.prepared.train.template_of(dialogue)
        found = encode_row(dialogue, template, self.prepared.codec, section.max_length)
        return found if isinstance(found, Example) else None

    def _written(self, prompts: Sequence[Prompt], place: Cursor) -> list[Example]:
        """What the student goes on with after each prompt; its end token is learnt, too."""
        stops = {stop for one in prompts for stop in self.prepared.train.template_of(one.dialogue).stop_ids}
        found = generate(
            self.loaded,
            self.policy.route,
            [prompt.ids for prompt in prompts],
            max_new_tokens=self.objective.max_new_tokens,
            stop_ids=stops,
            temperature=1.0,
            seed=seed_for(self.seed, "rollouts", place.epoch, place.position),
            batch_size=AT_ONCE,
        )
        rows = []
        for prompt, answer in zip(prompts, found, strict=True):
            ids = answer.ids + ([] if answer.end is None else [answer.end])
            learnt = [False] * len(prompt.ids) + [True] * len(ids)
            rows.append(Example(prompt.ids + ids, learnt, prompt.dialogue.where))
        return rows
