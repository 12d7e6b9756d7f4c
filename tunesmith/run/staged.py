"""Runs a list of stages, one after the other: all are looked at before the first begins, and none runs twice.

What a stage leaves behind is a run folder like any other; the list itself is `stages.yaml` beside them.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

from tunesmith.config import Config
from tunesmith.core.errors import CheckpointError, ConfigError
from tunesmith.core.files import FolderLock, os_error, write_atomic
from tunesmith.core.yaml import write_yaml_text
from tunesmith.evaluate.stage_list import LIST, holds_stages, names_in
from tunesmith.run import run, say
from tunesmith.run.folder import RunFolder, check_state, check_writable
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.run.stages import Stage, Stages, naming_stage


def run_stages(stages: Stages, *, resume: bool = False) -> Path:
    """Runs all stages that are not finished and answers the folder of all.

    Args:
        resume: go on with what is there, inside the stage that was cut.

    Raises: what `run` raises, with the stage; ConfigError, CheckpointError where the folder holds another list.
    """
    from tunesmith.evaluate.report import write_report

    check_writable(stages.out)
    _check_list(stages, resume)
    for stage in stages.stages:
        with naming_stage(stages, stage):
            _look(stages, stage, resume)
    try:
        stages.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(stages.out, error) from error
    with FolderLock(stages.out):
        _check_list(stages, resume)
        names = [stage.name for stage in stages.stages]
        write_atomic(stages.out / LIST, write_yaml_text({"stages": names}))
        for number, stage in enumerate(stages.stages, 1):
            say(f"\nstage {number} of {len(names)}: {stage.name}")
            with naming_stage(stages, stage):
                again = resume and RunFolder(stage.config.out).exists
                run(stage.config, resume=again, began=None if number == 1 else time.time())
            gc.collect()  # the next model needs the memory
        report = write_report(stages.out)
    say(f"\nall stages are finished\nreport {report}")
    return stages.out


def prepare_stage(stages: Stages, stage: Stage) -> Prepared:
    """A stage before it runs, whatever of those before it is there. Raises as `prepare`."""
    return prepare(stage.config, _unfinished(stages, stage))


def _unfinished(stages: Stages, stage: Stage) -> dict[str, Config]:
    return {out: config for out, config in stages.ahead(stage).items() if not RunFolder(out).is_finished}


def _look(stages: Stages, stage: Stage, resume: bool) -> None:
    """Finds what is wrong with a stage before anything runs."""
    folder = RunFolder(stage.config.out)
    if folder.exists:
        check_state(folder, stage.config, resume)
    if not folder.is_finished:
        prepare_stage(stages, stage)


def _check_list(stages: Stages, resume: bool) -> None:
    """Raises where these stages may not run in this folder: ConfigError, or CheckpointError on resume."""
    where = str(stages.out)
    if RunFolder(stages.out).exists:
        raise ConfigError("this folder holds a run of its own", where=f"out: {where}", hint="choose another out:")
    if not holds_stages(stages.out):
        if resume:
            raise CheckpointError("nothing to resume: no stage was begun here", where=where, hint="leave out --resume")
        return
    if not resume:
        hint = "--resume goes on with them; another out: begins anew"
        raise ConfigError("this folder holds stages already", where=f"out: {where}", hint=hint)
    before, now = names_in(stages.out), [stage.name for stage in stages.stages]
    if before != now:
        told = f"the list of stages is not the one it was begun with: {' '.join(before)} then, {' '.join(now)} now"
        raise CheckpointError(told, where=where, hint="undo the change, or choose another out:")
