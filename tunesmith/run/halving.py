"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), decided by Optuna's pruner.

The one idea: the pruner compares a trial with those that have reported before it, so whoever is asked first would
always go on. Here all runs of a rung are done before anybody is asked, and each setting is asked last, in a study in
memory which knows all the others. Nothing of Optuna's is stored: what was done is in the run folders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tunesmith.core.errors import ConfigError


def survivors(scores: Mapping[str, float | None], greater_is_better: bool) -> list[str]:
    """The names which go on, in their order: the best half, rounded down, but one at least; whoever is as good stays.

    Args:
        scores: of one rung by name; None or what is no finite number is a failure, which neither goes on nor counts.
        greater_is_better: whether the score is one to raise.

    Raises:
        ConfigError: Optuna is not installed.
    """
    require_optuna()
    done = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    with _silent():
        return [
            name
            for name, score in done.items()
            if _goes_on(score, [other for rival, other in done.items() if rival != name], greater_is_better)
        ]


def require_optuna() -> None:
    """Raises ConfigError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        hint = "pip install 'tunesmith[sweep]'"
        raise ConfigError("halving needs Optuna, which is not installed", where="--halving", hint=hint) from error


def _goes_on(score: float, rivals: Sequence[float], greater_is_better: bool) -> bool:
    """What the pruner says of a score when all rivals have reported."""
    import optuna

    study = optuna.create_study(
        direction="maximize" if greater_is_better else "minimize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    pruned = True
    for reported in [*rivals, score]:
        trial = study.ask()
        trial.report(reported, step=1)
        pruned = trial.should_prune()  # asked of rivals too: only so has the pruner seen them at the rung
    return not pruned


@contextmanager
def _silent() -> Iterator[None]:
    """Optuna tells of every study that it makes."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
