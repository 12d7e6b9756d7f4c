"""`layout: auto`: the layout that the planner finds fastest for the processes there are, of those the run can have.

The one idea: what is ranked for a described cluster is ranked for this machine, one device a process, with what the
limits of layouts leave of it. The first process chooses, and a resumed run keeps what it was begun with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from tunesmith.config import Config
from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import read_json
from tunesmith.models.families import family_of
from tunesmith.models.source import resolve
from tunesmith.parallel.layout import AutoLayout, LayoutSection, Shard
from tunesmith.parallel.limits import check_model, refusals
from tunesmith.run.folder import RunFolder

if TYPE_CHECKING:
    from tunesmith.parallel.world import Alone
    from tunesmith.plan.cluster import Cluster
    from tunesmith.plan.loads import Lacks, Work
    from tunesmith.plan.placed import Placed

AS_FAST = 1.02
RANKED = ("full", "lora")  # methods whose memory and messages the planner knows in every layout
# what is assumed of CPUs, for they are compared with each other alone: a core's products, and messages within a machine
CORE_TFLOPS, CPU_GB_PER_SECOND, CPU_LINK = 0.1, 10.0, {"gb_per_second": 1.5, "microseconds": 50.0}


def settled(config: Config, folder: RunFolder, world: Alone) -> tuple[Config, str]:
    """A configuration whose layout is known, and in a line why it is that one; empty where it was given.

    Raises: ConfigError or ModelError for a run that cannot be planned.
    """
    if not isinstance(config.layout, AutoLayout):
        return config, ""
    found = world.first(lambda: _known(folder, world.size) or choose(config, world.size))
    return config.model_copy(update={"layout": LayoutSection(**found["layout"])}), found["why"]


def choose(config: Config, processes: int) -> dict[str, Any]:
    """The layout of so many processes, and why: `{layout, why}`."""
    from tunesmith.plan.loads import Lacks
    from tunesmith.plan.placed import Placed

    options = list(possible(config, processes))
    if len(options) == 1:
        return _told(options[0], f"the only one of {processes} process{'es' * (processes > 1)} that this run can have")
    placed = _placed(config, options)
    fitting = [(layout, found) for layout, found in placed if isinstance(found, Placed)]
    if not fitting:
        lacking = [(layout, found.missing_bytes) for layout, found in placed if isinstance(found, Lacks)]
        layout, missing = min(lacking, key=lambda one: one[1])
        short = f"lacks {missing / 1e9:.1f} GB a process"
        return _told(layout, f"none of {len(placed)} fits into the memory there is, and this one lacks least: {short}")
    # nothing hidden, for collectives here wait for each other; and no split for what is as fast without
    fastest = min(found.exposed_seconds for _, found in fitting)
    layout, best = next(one for one in fitting if one[1].exposed_seconds <= AS_FAST * fastest)
    count = f"{len(fitting)} of {len(placed)} layouts fit into the memory there is"
    return _told(layout, f"{count}, and by the plan none is faster; {best.peak_bytes / 1e9:.2g} GB a process")


def possible(config: Config, processes: int) -> Iterator[LayoutSection]:
    """The layouts of so many processes that the limits leave, the least split first: all runs can have replicas."""
    settings = read_json(resolve(config.model) / "config.json", ModelError)
    yield LayoutSection(data=processes)
    if processes == 1 or not _is_ranked(config, settings):
        return
    sizes = [size for size in range(1, processes + 1) if processes % size == 0]
    for tensor in sizes:
        for pipeline in sizes:
            for shard in get_args(Shard):
                if processes % (tensor * pipeline) == 0 and (tensor * pipeline > 1 or shard != "none"):
                    section = _allowed(config, settings, processes // (tensor * pipeline), shard, tensor, pipeline)
                    if section is not None:
                        yield section


def _is_ranked(config: Config, settings: dict[str, Any]) -> bool:
    """Whether the planner can place the run."""
    decoder = family_of(settings).kind == "decoder" and not config.objective.predicts
    return decoder and config.method.kind in RANKED and config.precision.base == "same"


def _allowed(
    config: Config, settings: dict[str, Any], data: int, shard: Shard, tensor: int, pipeline: int
) -> LayoutSection | None:
    try:
        section = LayoutSection(data=data, shard=shard, tensor=tensor, pipeline=pipeline)
        check_model(section, settings)
    except (ValidationError, ConfigError):
        return None
    return None if any(refusals(config.model_copy(update={"layout": section}))) else section


def _placed(config: Config, options: list[LayoutSection]) -> list[tuple[LayoutSection, Placed | Lacks]]:
    from tunesmith.plan.layouts import Layout
    from tunesmith.plan.placed import Board
    from tunesmith.run.placing import pieces_of_run
    from tunesmith.train.precision import resolve as computes

    processes = options[0].processes
    cluster, pieces = machine(processes), pieces_of_run(config, computes(config.precision))
    work, micro_rows = _work(config, processes)
    again = "none" if config.train.recompute == "auto" else config.train.recompute
    found = []
    for one in options:
        board = Board(cluster, pieces, work, one.tensor, one.data, one.pipeline)
        schedule: Any = "1f1b" if one.pipeline > 1 else "none"
        layout = Layout(one.data, one.shard, one.tensor, one.pipeline, schedule, 1, again, micro_rows)
        found.append((one, board.place(layout)))
    return found


def machine(processes: int) -> Cluster:
    """This machine, and others like it, with a device for each process."""
    import torch

    from tunesmith.plan.cluster import ROOM, Cluster, ClusterSection
    from tunesmith.plan.devices import PRESETS
    from tunesmith.plan.room import room_bytes

    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        known = next((preset for preset in PRESETS if preset in name.replace(" ", "-")), "a100")
        memory = torch.cuda.get_device_properties(0).total_memory
        device = PRESETS[known].model_dump() | {"name": name, "memory_gb": memory / 1e9}
    else:
        device = {
            "name": "cpu",
            "tflops": CORE_TFLOPS * (os.cpu_count() or 1) / here,
            "memory_gb": max(room_bytes(), 1) / ROOM / here / 1e9,
            "memory_gb_per_second": CPU_GB_PER_SECOND,
            "within": CPU_LINK,
            "between": PRESETS["cpu"].between.model_dump(),
        }
    nodes = [{"device": device, "devices": here, "count": max(1, processes // here)}]
    return Cluster(ClusterSection.model_validate({"nodes": nodes}))


def _work(config: Config, processes: int) -> tuple[Work, int]:
    """A step, cut into rows so that every process has some, and the rows of a micro-batch."""
    from tunesmith.plan.loads import Work
    from tunesmith.run.placing import work_of

    asked, train = work_of(config), config.train
    rows = max(2 * processes, asked.rows - asked.rows % processes)
    work = Work(rows, max(1, asked.tokens // rows))
    wanted = train.micro_batch_rows or (train.micro_batch_tokens or work.row_tokens) // work.row_tokens
    return work, max(1, min(wanted, rows // processes))


def _known(folder: RunFolder, processes: int) -> dict[str, Any] | None:
    """What the run in the folder was begun with, where there are as many processes."""
    layout = folder.config.get("layout", {}) if folder.exists else {}
    if not layout or LayoutSection(**layout).processes != processes:
        return None
    return {"layout": layout, "why": f"{_name(LayoutSection(**layout))}, as the run was begun"}


def _told(layout: LayoutSection, why: str) -> dict[str, Any]:
    return {"layout": layout.model_dump(mode="json"), "why": f"{_name(layout)}: {why}"}


def _name(layout: LayoutSection) -> str:
    told = [f"{key} {getattr(layout, key)}" for key in ("data", "tensor", "pipeline") if getattr(layout, key) > 1]
    told += [layout.shard] if layout.shard != "none" else []
    return "layout: " + (", ".join(told) or "one process")
