"""What a run puts into its steps beside the rows of the data: completions of its own, or what a teacher says of rows.

Where nothing of that kind is asked for, the trainer reads the data as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.data.encode import Prompt
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.models.route import Route
    from tunesmith.parallel.world import Alone
    from tunesmith.run.folder import RunFolder
    from tunesmith.run.prepare import Prepared
    from tunesmith.run.teaching import Teaching


def _nobody(folder: Path) -> Sequence[Any]:
    return []


@dataclass(frozen=True)
class Feed:
    """How the trainer gets its rows.

    Attributes:
        collate: rows of a micro-batch as a Batch; None leaves `data.batch.to_batch`.
        stream: the steps from a cursor on; None leaves the data's.
        sample: completes a step when it begins; None where there is nothing to complete.
        watchers: who sees the records of the run.
        memory: what checkpoints keep of it, by name, as `adapter.memory`.
        earned: the mean reward of an answer to each of some prompts, where a run learns from one.
    """

    collate: Callable[[list[Any]], Batch] | None = None
    stream: Callable[[Any], Any] | None = None
    sample: Callable[[Any, int], Any] | None = None
    watchers: Callable[[Path], Sequence[Any]] = _nobody
    memory: Mapping[str, Any] = field(default_factory=dict)
    earned: Callable[[Sequence[Prompt], Sequence[str]], float] | None = None


def feed_of(
    prepared: Prepared,
    loaded: Loaded,
    policy: Policy,
    received: Route,
    teaching: Teaching | None,
    folder: RunFolder,
    world: Alone,
) -> Feed:
    """The feed of a run; the rows of the data and nothing else, where its objective asks for no more.

    Args:
        received: the model as the run received it.
        teaching: who teaches, in distillation.
        world: the processes that share the rows.
    """
    samples = prepared.config.objective.samples
    if teaching is not None:
        from tunesmith.run.own_answers import OwnAnswers

        teaching.stand_by(policy)
        if not samples:
            return Feed(teaching.collate)
        own = OwnAnswers(prepared, loaded, policy)
        return Feed(teaching.collate, own.stream, own)
    if not samples:
        return Feed()
    from tunesmith.run.rollouts import Rollouts

    rollouts = Rollouts(prepared, loaded, policy, received, folder.path, world)
    if world.is_first:
        folder.record(constant=rollouts.constant())
    return Feed(
        rollouts.collate, rollouts.stream, rollouts, rollouts.watchers, memory=rollouts.memory, earned=rollouts.earned
    )
